"""A base class for the local pages of development: `make watch`, and traces."""

from collections.abc import Mapping

from scripts.quiet_http import QuietHandler

NAMES = ("127.0.0.1", "localhost")


class LocalPage(QuietHandler):
    """A handler that responds to requests to this machine's own names.

    Other names may be rebound to it, by a page of another site in the same browser.
    """

    #: For all responses.
    own_headers: Mapping[str, str] = {}

    def do_GET(self) -> None:  # noqa: N802 - http.server names it
        """Call `get` with the path, without the query."""
        if self.headers.get("Host", "").rpartition(":")[0] in NAMES:
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
