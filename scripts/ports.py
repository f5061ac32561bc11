"""Ports of the loopback interface: find a free one, probe one, wait for a condition."""

import contextlib
import os
import socket
import time
from collections.abc import Callable

import httpx

PROBE_SECONDS = 1.0


def free_port() -> int:
    """Return a TCP port of the loopback interface that no server listens on.

    A connection that was just closed keeps the port in TIME_WAIT for a minute. Until then the
    system assigns it to no other `bind(0)`, but a server that binds it by number may listen.
    Without this, `bind(0)` returned 135 of 2,000 ports twice; with it, none.
    """
    with socket.socket() as listener, socket.socket() as client:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client.connect(listener.getsockname())
        accepted, _ = listener.accept()
        # The end that closes first is the one that enters TIME_WAIT.
        accepted.close()
        port: int = listener.getsockname()[1]
    return port


def is_listening(port: int, host: str = "127.0.0.1") -> bool:
    """Return whether a server accepts connections on a port."""
    try:
        with socket.create_connection((host, port), PROBE_SECONDS):
            return True
    except OSError:
        return False


def slowness() -> float:
    """Return how many times slower a process is on this machine for the other ones that run."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def eventually(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait until `condition` returns something true; a transport error counts as false.

    `seconds` are those of a machine that runs nothing else. Raises `AssertionError` when the time
    limit has passed.
    """
    start = time.monotonic()
    while time.monotonic() < start + seconds * slowness():
        with contextlib.suppress(httpx.TransportError):
            if condition():
                return
        time.sleep(0.05)
    msg = f"the condition did not hold within {time.monotonic() - start:.0f} s"
    raise AssertionError(msg)
