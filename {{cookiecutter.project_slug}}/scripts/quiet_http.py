"""A base class for HTTP servers of tests and of development."""

from http.server import BaseHTTPRequestHandler


class QuietHandler(BaseHTTPRequestHandler):
    """A handler of HTTP/1.1 that logs nothing, not even a lost client."""

    protocol_version = "HTTP/1.1"

    def handle_one_request(self) -> None:
        """Handle a request, unless the client has disconnected."""
        try:
            super().handle_one_request()
        except OSError:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def read_body(self) -> bytes:
        """Return the body of the request."""
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))
