"""The addresses to listen on: is one in use, and which one is free.

`python -m scripts.addresses` checks the settings and the addresses before `make run` starts
anything.
"""

import contextlib
import errno
import os
import socket
import sys

from app.setting_types import HostPort
from app.settings import Settings, load_settings

#: Ports to try after the first.
MAX_TRIES = 100
SETTINGS = ("bind", "metrics_bind")


def listen(address: HostPort) -> socket.socket:
    """Return a socket that listens. Raises `OSError`, with EADDRINUSE if the address is in use."""
    return socket.create_server((address.host, address.port), family=address.family, backlog=2048)


def at_port(address: HostPort, port: int) -> HostPort:
    """Return the address with another port."""
    host, _, _ = address.rpartition(":")
    return HostPort(f"{host}:{port}")


def free_address(name: str, address: HostPort) -> HostPort:
    """Return the address, or with the next free port, and a line that reports it.

    Raises `SystemExit` if the host is none of this machine, or if no port is free.
    """
    last = min(address.port + MAX_TRIES, 65_535)
    for port in range(address.port, last + 1):
        candidate = at_port(address, port)
        try:
            listen(candidate).close()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                sys.exit(f"{name}={candidate}: {error.strerror}; set {name} to another address")
            continue
        if candidate != address:
            sys.stdout.write(f"{address} is in use: {name} is {candidate} now\n")
        return candidate
    sys.exit(f"{name}={address}: in use, and the next {MAX_TRIES} ports are too")


def require_free(settings: Settings) -> None:
    """Raise `SystemExit` with one line and the remedy if an address is in use."""
    for field in SETTINGS:
        name = field.upper()
        address: HostPort = getattr(settings, field)
        try:
            listen(address).close()
        except OSError as error:
            action = f"stop the process that listens there, or set {name} to another address"
            sys.exit(f"{name}={address}: {os.strerror(error.errno or 0)}; {action}")


def main() -> None:
    """Check the settings, then the addresses."""
    with contextlib.suppress(KeyboardInterrupt):
        require_free(load_settings())


if __name__ == "__main__":
    main()
