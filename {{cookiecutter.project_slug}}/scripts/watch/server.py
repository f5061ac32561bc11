"""The page, and its server-sent events."""

import contextlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from app.setting_types import HostPort
from scripts.watch.view import View

PAGE = Path(__file__).with_name("watch.html")
#: A comment after this time without an event: a write to a page that has gone fails.
KEEPALIVE_SECONDS = 10.0
#: The page loads nothing, from nowhere else.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)


class Handler(BaseHTTPRequestHandler):
    """`GET /` is the page, `GET /events` its feed."""

    protocol_version = "HTTP/1.1"
    view: View

    def do_GET(self) -> None:
        """Serve this machine's own names only: others may be rebound to it."""
        host = self.headers.get("Host", "").rpartition(":")[0]
        path = self.path.partition("?")[0]
        with contextlib.suppress(OSError):  # the browser has left
            if host not in {"127.0.0.1", "localhost"}:
                self._respond(403, b"", "text/plain")
            elif path == "/":
                self._respond(200, PAGE.read_bytes(), "text/html; charset=utf-8")
            elif path == "/events":
                self._send_events()
            else:
                self._respond(404, b"", "text/plain")

    def _respond(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write(content)

    def _send_events(self) -> None:
        """Send the history, then what is new, until the browser disconnects."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        last = self.headers.get("Last-Event-ID", "")
        number = int(last) if last.isdecimal() else 0
        while True:
            number, entries = self.view.after(number, KEEPALIVE_SECONDS)
            data = f"id: {number}\ndata: [{','.join(entries)}]\n\n" if entries else ":\n\n"
            self.wfile.write(data.encode())

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def open_server(view: View, address: HostPort) -> ThreadingHTTPServer:
    """Return a server that listens. `serve_forever` runs it."""
    handler = type("ViewHandler", (Handler,), {"view": view})
    return ThreadingHTTPServer((address.host, address.port), handler)
