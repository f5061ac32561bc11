"""Our encoder against OpenTelemetry's, which is the reference."""

import logging
import sys
import threading
import time
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    Link,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
)

from app.settings import Settings
from app.telemetry import span_encoding
from app.telemetry.trace_export import SpanSender

TRACE_ID = 0x4BF92F3577B34DA6A3CE929D0E0E4736
IDS = SpanContext(TRACE_ID, 1 << 63, False, TraceFlags(3), TraceState([("a", "1"), ("b", "2")]))
RESOURCE = Resource({"service.name": "orders", "host.cpus": 4}, "https://example.com/schema")
SCOPE = InstrumentationScope("app", "")


def span(**options: Any) -> ReadableSpan:
    defaults: dict[str, Any] = {
        "name": "GET /",
        "context": SpanContext(TRACE_ID, 7, False, TraceFlags(1)),
        "resource": RESOURCE,
        "instrumentation_scope": SCOPE,
        "start_time": 1_700_000_000_000_000_000,
        "end_time": 1_700_000_000_000_000_999,
    }
    return ReadableSpan(**(defaults | options))


SPANS = {
    "plain": [span(), span(context=IDS, attributes={"method": "GET", "status": 200})],
    "every kind": [span(kind=kind) for kind in SpanKind],
    "values": [span(attributes={"a": "é", "b": True, "c": -1, "d": 0.5, "e": "", "f": 0})] * 2,
    "equal values of other types": [span(attributes={"a": each}) for each in (1, True, 1.0, 1)],
    "long values": [span(attributes={"a": 300 * "x", "b": 1})] * 2,
    "rare values": [
        span(attributes={"a": value, "b": 1}) for value in ([1, 2], ("a",), None, {"x": 1}, b"a")
    ],
    "invalid values": [span(attributes={"a": value, "b": 1}) for value in (1 << 70, "\ud800")],
    "parents": [
        span(parent=SpanContext(TRACE_ID, 9, is_remote, TraceFlags(1)))
        for is_remote in (True, False, True)
    ],
    "statuses": [
        span(status=Status(code, text))
        for code, text in ((StatusCode.OK, None), (StatusCode.ERROR, "x"), (StatusCode.ERROR, None))
    ],
    "events": [span(events=[Event("exception", {"a": 1}, 5)], attributes={"b": 1})] * 2,
    "links": [span(links=[Link(IDS, {"a": 1})])] * 2,
}


def groups(request: ExportTraceServiceRequest) -> list[bytes]:
    """Return each span with its process and its library."""
    return [
        b"".join(
            each.SerializeToString(deterministic=True)
            for each in (resource.resource, scope.scope, span)
        )
        + f"{resource.schema_url} {scope.schema_url}".encode()
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


@pytest.mark.parametrize("name", SPANS)
def test_spans_are_encoded_as_by_opentelemetry(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(logging.getLogger("opentelemetry"), "disabled", True)
    # The first one of a group is encoded by OpenTelemetry itself.
    spans = [span(), *SPANS[name]]
    assert span_encoding.encode(spans) == encode_spans(spans)


def test_spans_are_grouped_by_process_and_library() -> None:
    scopes = [SCOPE, InstrumentationScope("sqlalchemy", "2.0", "https://example.com/s"), None]
    resources = [RESOURCE, Resource({"service.name": "other"})]
    spans = [
        span(resource=resource, instrumentation_scope=scope, name=f"{number}")
        for number in range(3)
        for resource in resources
        for scope in scopes
    ]
    ours = span_encoding.encode(spans)
    assert sorted(groups(ours)) == sorted(groups(encode_spans(spans)))
    assert len(ours.resource_spans) == 6


def test_other_threads_run_in_between() -> None:
    """At an interval at which none would get a turn before the end."""
    thread = threading.Thread(target=span_encoding.encode, args=[[span()] * 20_000])
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)
    try:
        thread.start()
        turns = 0
        while thread.is_alive():
            turns += 1
            time.sleep(0)
        assert turns > 20
    finally:
        sys.setswitchinterval(interval)


def test_long_values_are_not_kept() -> None:
    before = span_encoding._encode_once.cache_info().currsize
    span_encoding.encode([span(attributes={"path": f"/{number:01000}"}) for number in range(10)])
    assert span_encoding._encode_once.cache_info().currsize == before


def test_no_spans_are_an_empty_request() -> None:
    assert span_encoding.encode([]) == encode_spans([])


def test_exporter_encodes_by_it() -> None:
    SpanSender(Settings(otel_exporter_otlp_endpoint="http://collector:4318")).shutdown()
    assert vars(trace_exporter)["encode_spans"] is span_encoding.encode
