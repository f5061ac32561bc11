"""The span of a request is that of OpenTelemetry's SDK, whether the SDK has made it or not."""

import asyncio
import contextvars
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.trace import SpanContext
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from app.settings import Settings
from app.telemetry.trace_export import Export
from app.telemetry.tracing import RequestSpan, Tracing

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
CALLER = [(b"traceparent", PARENT.encode()), (b"tracestate", b"a=1,b=2")]
LIMITS = ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT")


def make_export(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Export:
    # That of the process stays as it is.
    monkeypatch.setattr(trace, "set_tracer_provider", print)
    return Export(Settings(otel_exporter_otlp_endpoint="http://collector:4318", **settings))


class Exported:
    """The spans that an `Export` would send."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.export = make_export(monkeypatch)
        self.spans: list[ReadableSpan] = []
        monkeypatch.setattr(self.export.processor, "on_end", self.spans.append)

    def request(
        self, labels: tuple[str, str, int], *, adds: bool = False, **scope: Any
    ) -> SpanContext:
        """Serve a request, to whose span a feature adds an attribute or not; return its IDs."""
        return contextvars.copy_context().run(self._request, labels, scope, adds=adds)

    def _request(
        self, labels: tuple[str, str, int], scope: dict[str, Any], *, adds: bool
    ) -> SpanContext:
        full = {"method": "GET", "scheme": "http", "headers": []} | scope
        keys = {"trace_id": ""} if full["headers"] else {}
        span = Tracing(self.export).start_request(full, keys)
        assert isinstance(span, RequestSpan)
        assert trace.get_current_span().get_span_context() is span.get_span_context()
        assert span.is_recording()
        if adds:
            trace.get_current_span().set_attribute("added", 1)
        error = "ZeroDivisionError" if labels[2] == 500 else ""
        span.finish(full, labels, "/items/42", error)
        assert not span.is_recording()
        trace.get_current_span().set_attribute("late", 1)
        return span.get_span_context()


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Iterator[Exported]:
    exported = Exported(monkeypatch)
    yield exported
    asyncio.run(exported.export.close())


def wire(span: ReadableSpan) -> Any:
    """Return a span as it is sent, without what differs between two requests."""
    (resource,) = encode_spans([span]).resource_spans
    (scope,) = resource.scope_spans
    assert scope.scope.name == "app"
    (found,) = scope.spans
    assert found.start_time_unix_nano < found.end_time_unix_nano
    own = ("span_id", "start_time_unix_nano", "end_time_unix_nano")
    for name in own if found.parent_span_id else (*own, "trace_id"):
        assert getattr(found, name)
        found.ClearField(name)
    attributes = [each for each in found.attributes if each.key != "added"]
    del found.attributes[:]
    found.attributes.extend(attributes)
    return found


@pytest.mark.parametrize(
    ("labels", "scope"),
    [
        (("GET", "/items/{number}", 200), {"client": ("192.0.2.1", 5)}),
        (("_OTHER", "unmatched", 404), {"method": "BREW"}),
        (("GET", "/items/{number}", 500), {"scheme": "https"}),
        (("GET", "/items/{number}", 503), {"headers": CALLER}),
    ],
)
def test_span_that_the_sdk_did_not_make_is_sent_like_its_own(
    exported: Exported, labels: tuple[str, str, int], scope: dict[str, Any]
) -> None:
    ours = exported.request(labels, **scope)
    sdk = exported.request(labels, adds=True, **scope)
    assert len(exported.spans) == 2
    assert not any(isinstance(span, Span) for span in exported.spans)
    assert [span.context.span_id for span in exported.spans] == [ours.span_id, sdk.span_id]
    assert exported.spans[0].context.trace_flags == exported.spans[1].context.trace_flags
    assert exported.spans[0].resource == exported.spans[1].resource
    assert exported.spans[0].instrumentation_scope == exported.spans[1].instrumentation_scope
    assert wire(exported.spans[0]) == wire(exported.spans[1])
    assert [dict(span.attributes or {}).get("added") for span in exported.spans] == [None, 1]


@pytest.mark.parametrize("sampler", ["always_on", "always_off", "parentbased_always_off"])
@pytest.mark.parametrize("flags", [None, "00", "01", "02", "03"])
def test_ids_and_flags_are_handed_on_as_by_the_sdk(
    monkeypatch: pytest.MonkeyPatch, sampler: Any, flags: str | None
) -> None:
    """W3C Trace Context Level 2, section 3.2.2.5: the flags `sampled` and `random-trace-id`."""
    export = make_export(monkeypatch, otel_traces_sampler=sampler)
    headers = {"traceparent": f"{PARENT[:-2]}{flags}", "tracestate": "a=1"} if flags else {}
    caller = TraceContextTextMapPropagator().extract(headers, Context())
    sdk = export.tracer.start_span("GET", caller).get_span_context()
    found: dict[str, str] = {}
    keys = {"trace_id": ""} if flags else {}

    def serve() -> SpanContext:
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        Tracing(export).start_request({"method": "GET", "headers": encoded}, keys)
        TraceContextTextMapPropagator().inject(found)
        trace.get_current_span().set_attribute("a", 1)
        return trace.get_current_span().get_span_context()

    ours = contextvars.copy_context().run(serve)
    assert (ours.trace_flags, ours.trace_state) == (sdk.trace_flags, sdk.trace_state)
    assert ours.is_valid
    assert ours.is_remote is False
    assert flags is None or ours.trace_id == sdk.trace_id
    ids = f"{keys['trace_id']}-{keys['span_id']}"
    assert found["traceparent"] == f"00-{ids}-{sdk.trace_flags:02x}"
    assert keys["trace_flags"] == f"{sdk.trace_flags & 1:02x}"
    asyncio.run(export.close())


def test_new_trace_after_that_of_a_caller_has_its_own_id(exported: Exported) -> None:
    caller = exported.request(("GET", "/", 200), adds=True, headers=CALLER)
    root = exported.export.tracer.start_span("root", Context()).get_span_context()
    assert root.trace_id != caller.trace_id
    assert root.span_id != caller.span_id


def test_processor_of_a_feature_sees_the_span_of_each_request(exported: Exported) -> None:
    """OpenTelemetry, "Tracing SDK", section "Span processor"."""
    seen: list[tuple[str, int]] = []

    class Processor(SpanProcessor):
        def on_start(self, span: Span, parent_context: Any = None) -> None:
            seen.append(("start", span.get_span_context().span_id))
            span.set_attribute("tenant", "a")

        def on_end(self, span: ReadableSpan) -> None:
            seen.append(("end", span.context.span_id))

    exported.export.provider.add_span_processor(Processor())
    ids = exported.request(("GET", "/", 200))
    assert seen == [("start", ids.span_id), ("end", ids.span_id)]
    assert (exported.spans[0].attributes or {})["tenant"] == "a"


@pytest.mark.parametrize("name", LIMITS)
def test_limits_of_attributes_hold(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """OpenTelemetry, "Environment Variable Specification", section "Attribute Limits"."""
    monkeypatch.setenv(name, "3")
    exported = Exported(monkeypatch)
    exported.request(("GET", "/items/{number}", 200))
    asyncio.run(exported.export.close())
    attributes = dict(exported.spans[0].attributes or {})
    if name == LIMITS[0]:
        assert len(attributes) == 3
        assert exported.spans[0].dropped_attributes == 2
    else:
        assert attributes["url.path"] == "/it"
