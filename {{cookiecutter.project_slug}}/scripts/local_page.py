"""A base class for the local pages of development: `make watch`, and traces."""

import contextlib
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler

NAMES = ("127.0.0.1", "localhost")


class LocalPage(BaseHTTPRequestHandler):
    """A handler that responds to requests to this machine's own names, and logs nothing.

    Other names may be rebound to it, by a page of another site in the same browser.
    """

    protocol_version = "HTTP/1.1"
    #: For all responses.
    own_headers: Mapping[str, str] = {}

    def do_GET(self) -> None:
        """Call `get` with the path, without the query."""
        host = self.headers.get("Host", "").rpartition(":")[0]
        with contextlib.suppress(OSError):  # the browser has left
            if host in NAMES:
                self.get(self.path.partition("?")[0])
            else:
                self.respond(403)

    def get(self, path: str) -> None:
        """Respond to a GET request."""
        raise NotImplementedError

    def respond(self, status: int, content: bytes = b"", kind: str = "text/plain") -> None:
        """Send a response that no cache keeps."""
        own = {"Content-Type": kind, "Content-Length": str(len(content))}
        self.send_response(status)
        for name, value in (own | {"Cache-Control": "no-store", **self.own_headers}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Log nothing."""
