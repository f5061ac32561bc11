"""The page, and its server-sent events."""

from collections.abc import Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path

from app.setting_types import HostPort
from scripts.local_page import LocalPage
from scripts.watch.view import View

PAGE = Path(__file__).with_name("watch.html")
#: A comment after this time without an event: a write to a page that has gone fails.
KEEPALIVE_SECONDS = 10.0
#: The page loads nothing, from nowhere else.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)


class Handler(LocalPage):
    """`GET /` is the page, `GET /events` its feed."""

    own_headers: Mapping[str, str] = {"Content-Security-Policy": POLICY}
    view: View

    def get(self, path: str) -> None:
        """Respond with the page or its feed."""
        if path == "/":
            self.respond(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif path == "/events":
            self._send_events()
        else:
            self.respond(404)

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


def open_server(view: View, address: HostPort) -> ThreadingHTTPServer:
    """Return a server that listens. `serve_forever` runs it."""
    handler = type("ViewHandler", (Handler,), {"view": view})
    return ThreadingHTTPServer((address.host, address.port), handler)
