"""A receiver of OTLP over HTTP for tests: it reads with protobuf's own strict reader."""

import contextlib
import gzip
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as WireSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from tests.service_process import eventually

DECODERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, "gzip": gzip.decompress}


class Span(NamedTuple):
    """A span as it arrived."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent: str
    seconds: float
    start: float
    is_failed: bool
    attributes: dict[str, Any]
    #: Attributes of the process.
    resource: dict[str, Any]
    #: Everything that was sent of it, as text.
    wire: str


class Receiver:
    """What has arrived. `response` decides what the next request gets."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.spans: list[Span] = []
        self.headers: list[dict[str, str]] = []
        #: A status; or 0 to never respond.
        self.response = 200
        self.lock = threading.Lock()

    def wait(self, condition: Callable[[list[Span]], object]) -> list[Span]:
        """Wait until the spans meet a condition; return them."""
        eventually(lambda: condition(self.spans))
        return self.named("")

    def wait_for(self, name: str) -> Span:
        """Wait for a span of this name; return the newest."""
        eventually(lambda: name in [span.name for span in self.named(name)])
        return [span for span in self.named(name) if span.name == name][-1]

    def named(self, start: str) -> list[Span]:
        """Return the spans whose name starts so, in the order of their start."""
        with self.lock:
            found = [span for span in self.spans if span.name.startswith(start)]
        return sorted(found, key=lambda span: span.start)

    def trace(self, root: Span) -> list[Span]:
        """Return the spans of a trace, in the order of their start."""
        return [span for span in self.named("") if span.trace_id == root.trace_id]

    def clear(self) -> None:
        """Forget what has arrived."""
        with self.lock:
            self.spans.clear()
            self.headers.clear()

    def add(self, body: bytes, headers: dict[str, str]) -> None:
        """Read a request, or raise the error of a malformed one."""
        request = ExportTraceServiceRequest.FromString(body)
        with self.lock:
            self.headers.append(headers)
            for resource in request.resource_spans:
                about = _plain(resource.resource.attributes)
                for scope in resource.scope_spans:
                    self.spans += [_span(each, about) for each in scope.spans]


def _plain(attributes: Any) -> dict[str, Any]:
    found: list[KeyValue] = list(attributes)
    return {each.key: getattr(each.value, str(each.value.WhichOneof("value"))) for each in found}


def _span(wire: WireSpan, resource: dict[str, Any]) -> Span:
    return Span(
        name=wire.name,
        kind=WireSpan.SpanKind.Name(wire.kind).removeprefix("SPAN_KIND_"),
        trace_id=wire.trace_id.hex(),
        span_id=wire.span_id.hex(),
        parent=wire.parent_span_id.hex(),
        seconds=(wire.end_time_unix_nano - wire.start_time_unix_nano) / 1e9,
        start=wire.start_time_unix_nano / 1e9,
        is_failed=wire.status.code == Status.STATUS_CODE_ERROR,
        attributes=_plain(wire.attributes),
        resource=resource,
        wire=str(wire),
    )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    receiver: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status = self.receiver.response
        while status == 0:
            time.sleep(0.05)
            status = self.receiver.response
        content = b""
        if status == 200:
            assert self.path == "/v1/traces"
            assert self.headers["Content-Type"] == "application/x-protobuf"
            body = DECODERS[self.headers.get("Content-Encoding", "")](body)
            self.receiver.add(body, dict(self.headers))
            content = ExportTraceServiceResponse().SerializeToString()
        self.send_response(status)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that have left."""


@contextlib.contextmanager
def receiving() -> Iterator[Receiver]:
    """Run a receiver during the block."""
    handler = type("Handler", (_Handler,), {})
    with _Server(("127.0.0.1", 0), handler) as server:
        receiver = Receiver(server.server_port)
        handler.receiver = receiver  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield receiver
        finally:
            receiver.response = 500  # releases requests without a response
            server.shutdown()
            thread.join()
