"""Serve the live view: `python -m scripts.watch`, or `make run | make watch`."""

import contextlib
import os
import stat
import sys
import webbrowser
from urllib.parse import urlsplit

from app.setting_types import MAX_PORT, HostPort
from scripts import addresses
from scripts.watch.lines import Lines
from scripts.watch.polling import Polling
from scripts.watch.server import open_server
from scripts.watch.view import View

#: Or the next one that is free.
PORT = 8900
SERVICE = "http://127.0.0.1:8000"
DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY")
METRICS = "http://127.0.0.1:9464/metrics"


def main() -> None:
    """Serve until Ctrl-C. Raises `SystemExit` with one line if a variable is invalid."""
    service = _url("SERVICE", os.environ.get("SERVICE") or SERVICE)
    metrics = [_url("METRICS", url) for url in (os.environ.get("METRICS") or METRICS).split()]
    address = _address()
    view = View()
    Polling(view, service, metrics).start()
    if stat.S_ISFIFO(os.fstat(sys.stdin.fileno()).st_mode):
        Lines(view, sys.stdin.buffer).start()
    server = open_server(view, address)
    sys.stdout.write(f"  watch     http://{address}/   of {service}\n")
    sys.stdout.flush()
    _open_browser(f"http://{address}/")
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


def _address() -> HostPort:
    """Return a free address of this machine alone, since the page has no login."""
    value = os.environ.get("WATCH_PORT") or str(PORT)
    if not (value.isdecimal() and 0 < int(value) <= MAX_PORT):
        sys.exit(f"WATCH_PORT={value}: must be a port, such as {PORT}")
    return HostPort(addresses.free_address("WATCH_PORT", HostPort(f"127.0.0.1:{value}")))


def _url(name: str, value: str) -> str:
    try:
        parts = urlsplit(value)
        is_valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_valid = False
    if not is_valid:
        sys.exit(
            f"{name}={value}: must be a URL such as {SERVICE if name == 'SERVICE' else METRICS}"
        )
    return value


def _open_browser(url: str) -> None:
    """Open the page on a desktop. On a terminal alone, a text browser would start."""
    is_desktop = sys.platform == "darwin" or any(map(os.environ.get, DISPLAYS))
    if is_desktop and sys.stdout.isatty():
        webbrowser.open(url)


if __name__ == "__main__":
    main()
