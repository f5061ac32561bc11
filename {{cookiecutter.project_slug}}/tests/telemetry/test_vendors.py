"""Sentry and OpenTelemetry's agent, with the request middleware."""

import gzip
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from scripts import dev_services
from tests.service_process import eventually, serving

pytestmark = pytest.mark.process


@pytest.fixture
def events() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The DSN of a local receiver of Sentry's envelopes, and the events that arrive."""
    found: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            items = [json.loads(line) for line in body.splitlines() if line.startswith(b"{")]
            found.extend(item for item in items if "exception" in item)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://key@127.0.0.1:{server.server_port}/1", found
        server.shutdown()
        thread.join()


def test_bug_is_one_event_of_sentry_with_its_route(
    database_url: str, redis: dev_services.Redis, events: tuple[str, list[dict[str, Any]]]
) -> None:
    """Sentry reports handled ones too: a 404 is none."""
    pytest.importorskip("sentry_sdk")
    dsn, found = events
    urls = {"DATABASE_URL": database_url, "REDIS_URL": redis.url, "SENTRY_DSN": dsn}
    with serving("tests.sentry_routes:app", WEB_CONCURRENCY="1", **urls) as service:
        service.wait()
        assert service.get("/nothing").status_code == 404
        response = service.get("/bug/1", **{"X-Request-ID": "reported"})
        assert response.status_code == 500
        eventually(lambda: found)
        assert service.stop() == 0
    (event,) = found
    (error,) = event["exception"]["values"]
    assert error["type"] == "ZeroDivisionError"
    assert event["transaction"] == "/bug/{number}"
    headers = event["request"]["headers"]
    assert {name.lower(): value for name, value in headers.items()}["x-request-id"] == "reported"
    assert os.environ.get("SENTRY_DSN") is None
