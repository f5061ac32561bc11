"""Traces of development on a local page: `make dev TRACE=1`. No container, no package of its own.

`python -m scripts.dev_traces HOST:PORT` receives spans (OTLP over HTTP) and serves the page.
"""

import contextlib
import gzip
import json
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from app.setting_types import HostPort
from scripts import addresses, dev_child
from scripts.local_page import LocalPage

PAGE = Path(__file__).with_name("dev_traces.html")
#: The port of OTLP over HTTP.
ADDRESS = HostPort("127.0.0.1:4318")
MAX_TRACES = 200
MAX_SPANS = 500
#: A body that is larger is no batch of ours.
MAX_BYTES = 64 << 20
KINDS = ("", "internal", "server", "client", "producer", "consumer")
FAILED = 2


class Traces:
    """The newest traces, by ID in the order of their first span."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.spans: OrderedDict[str, list[dict[str, Any]]] = OrderedDict()

    def add(self, body: bytes) -> None:
        """Add the spans of a request. Raises `DecodeError`."""
        request = ExportTraceServiceRequest.FromString(body)
        with self.lock:
            for resource in request.resource_spans:
                process = _plain(resource.resource.attributes).get("service.instance.id", "")
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        self._add(_span(span, process.rpartition("-")[2]))

    def _add(self, span: dict[str, Any]) -> None:
        spans = self.spans.setdefault(span["trace"], [])
        if len(spans) < MAX_SPANS:
            spans.append(span)
        while len(self.spans) > MAX_TRACES:
            self.spans.popitem(last=False)

    def newest_first(self) -> list[list[dict[str, Any]]]:
        """Return the traces, each with its spans in the order of their start."""
        with self.lock:
            found = [sorted(spans, key=_start) for spans in self.spans.values()]
        return sorted(found, key=lambda spans: _start(spans[0]), reverse=True)


def _start(span: dict[str, Any]) -> float:
    return float(span["start"])


def _plain(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


def _span(span: Any, pid: str) -> dict[str, Any]:
    return {
        "trace": span.trace_id.hex(),
        "id": span.span_id.hex(),
        "parent": span.parent_span_id.hex(),
        "name": span.name,
        "kind": KINDS[span.kind],
        "pid": pid,
        # Milliseconds, as JavaScript has them
        "start": span.start_time_unix_nano / 1e6,
        "end": span.end_time_unix_nano / 1e6,
        "failed": span.status.code == FAILED,
        "attributes": _plain(span.attributes),
    }


class Handler(LocalPage):
    """`POST /v1/traces` of the exporter; `GET /` and `GET /traces` of the page."""

    traces: Traces

    def do_POST(self) -> None:  # noqa: N802 - http.server names it
        """Receive spans."""
        size = int(self.headers.get("Content-Length", 0))
        if self.path != "/v1/traces" or size > MAX_BYTES:
            self.close_connection = True
            self.respond(404)
            return
        body = self.read_body()
        try:
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            self.traces.add(body)
        except (DecodeError, OSError, EOFError):
            self.respond(400, b"not OTLP in protobuf\n")
        else:
            self.respond(200, kind="application/x-protobuf")

    def get(self, path: str) -> None:
        """Respond with the page or its data."""
        if path == "/":
            self.respond(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif path == "/traces":
            content = json.dumps(self.traces.newest_first()).encode()
            self.respond(200, content, "application/json")
        else:
            self.respond(404)


@contextlib.contextmanager
def tracing() -> Iterator[str]:
    """Serve the page during the block if `TRACE` is set; yield its URL, or an empty text.

    The processes that are started in the block send their spans to it.
    """
    if os.environ.get("TRACE", "0") in {"", "0"}:
        yield ""
        return
    address = addresses.free_address("TRACE", ADDRESS)
    child = dev_child.start("scripts.dev_traces", address)
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://{address}"
    os.environ["OTEL_BSP_SCHEDULE_DELAY"] = "200"
    try:
        yield f"http://{address}/"
    finally:
        dev_child.stop(child)


def main() -> None:
    """Serve until the end of the parent."""
    address = HostPort(sys.argv[1])
    Handler.traces = Traces()
    ThreadingHTTPServer((address.host, address.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
