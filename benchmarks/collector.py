"""A collector of spans for the benchmark: it accepts every batch of OTLP over HTTP."""

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Collector(ThreadingHTTPServer):
    """Counts the bytes of spans by the path to which they are sent."""

    daemon_threads = True

    def __init__(self) -> None:
        """Listen on a free port."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received_bytes: dict[str, int] = {}

    def endpoint(self, name: str) -> str:
        """Return the value of `OTEL_EXPORTER_OTLP_ENDPOINT` for a server."""
        return f"http://127.0.0.1:{self.server_port}/{name}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Collector

    def do_POST(self) -> None:
        """Accept a batch."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        name = self.path.split("/")[1]
        self.server.received_bytes[name] = self.server.received_bytes.get(name, 0) + len(body)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextlib.contextmanager
def run_collector() -> Iterator[Collector]:
    """Run a collector during the block."""
    with Collector() as collector:
        threading.Thread(target=collector.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield collector
        finally:
            collector.shutdown()
