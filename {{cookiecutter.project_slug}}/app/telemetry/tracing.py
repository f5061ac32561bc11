"""Traces by OpenTelemetry's API: a span for each sampled request, and for all that it calls.

While traces are off, `current` is None and the SDK is not loaded, see trace_setup.py. README.md,
"Traces", lists the spans and the settings.

A span of a query, a command or a call is made only within another one that is recorded. So probes,
loops in the background and requests that are not sampled make none.
"""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from random import getrandbits
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from opentelemetry import context, trace
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope

_W3C = TraceContextTextMapPropagator()
_W3C_HEADERS = frozenset({b"traceparent", b"tracestate"})
#: The keys of `carrier`.
CARRIER_KEYS = frozenset({"traceparent", "tracestate"})
#: The part of a trace ID by which `TraceIdRatioBased` samples.
_SAMPLED_BITS = (1 << 64) - 1
_TRACE_ID_BITS = (1 << 128) - 1
#: All flags of W3C's level 2, by their bits: `sampled` and `random-trace-id`.
_TRACE_FLAGS = tuple(TraceFlags(bits) for bits in range(4))
_UNSET = Status(StatusCode.UNSET)
_FAILED = Status(StatusCode.ERROR)
#: The flag `sampled` in log lines, by whether it is set.
_FLAGS = {False: "00", True: "01"}

#: The key of the active span in OpenTelemetry's context.
(_SPAN_KEY,) = trace.set_span_in_context(trace.INVALID_SPAN, context.Context())

#: The tracing of this process, or None while it is off; trace_setup.py sets it.
current: "Tracing | None" = None


class Sampling(NamedTuple):
    """The decision of `OTEL_TRACES_SAMPLER`, in a third of the time that the SDK needs."""

    #: Whether the flag of a caller decides, if there is one.
    follows_parent: bool
    #: Traces whose ID is smaller, in the bits that count, are sampled.
    bound: int

    def includes(self, trace_id: int, parent: SpanContext | None) -> bool:
        """Return whether a trace is sampled. The ID may have more bits in front."""
        if parent is not None and self.follows_parent:
            return parent.trace_flags.sampled
        return trace_id & _SAMPLED_BITS < self.bound


class SpanIds(threading.local):
    """Hands the IDs of a span, by which it was sampled, over to the SDK in the same thread."""

    next_trace_id = 0
    next_span_id = 0


class SpanExport(Protocol):
    """Sends the spans of a process: trace_export.py, whose SDK is imported only if it is used."""

    tracer: trace.Tracer
    sampling: Sampling

    @property
    def ids(self) -> SpanIds: ...  # noqa: D102
    @property
    def needs_sdk_spans(self) -> bool: ...  # noqa: D102
    def send_request(  # noqa: D102
        self, span: "RequestSpan", name: str, attributes: dict[str, Any], status: Status
    ) -> None: ...


class Tracing:
    """Starts the spans of this process."""

    def __init__(self, export: SpanExport) -> None:
        self.export = export
        self.tracer = export.tracer
        self.sampling = export.sampling

    def start_request(self, scope: Scope, keys: dict[str, str]) -> "RequestSpan | None":
        """Make the span of a request the active one; return it if it is sampled.

        Its IDs are added to the `keys` of the request's log lines. A request that is not sampled
        has only IDs, for its lines and for the services that it calls.
        """
        parent = _caller(scope) if "trace_id" in keys else None
        # Both IDs are one number: to make and to format two takes twice the time.
        number = getrandbits(192) if parent is None else getrandbits(64) << 128 | parent.trace_id
        is_sampled = self.sampling.includes(number, parent)
        span = RequestSpan(self.export, scope["method"], number, parent, is_sampled)
        # A request is a task of its own, so nothing has to detach it.
        context.attach(context.Context({_SPAN_KEY: span}))
        ids = number.to_bytes(24).hex()
        keys["trace_id"] = ids[16:]
        keys["span_id"] = ids[:16]
        keys["trace_flags"] = _FLAGS[is_sampled]
        return span if is_sampled else None


@Span.register
class RequestSpan:
    """The span of a request: the objects of OpenTelemetry are made only if something needs them.

    The SDK makes a span that may change, with locks and limits, in four times the time. So it makes
    this one only if something else than `finish` adds to it, see `__getattr__`.
    """

    #: The SDK's span in place of this one.
    sdk_span: Span | None = None
    #: The IDs as OpenTelemetry's object.
    ids: SpanContext | None = None

    def __init__(
        self,
        export: SpanExport,
        method: str,
        number: int,
        parent: SpanContext | None,
        is_sampled: bool,
    ) -> None:
        """`number` is the ID of the span, then that of the trace."""
        self.export = export
        self.method = method
        self.number = number
        self.parent = parent
        #: Whether it is sampled, and has not been sent.
        self.is_recorded = is_sampled
        if is_sampled:
            self.start_ns = time.time_ns()
            if export.needs_sdk_spans:
                self._make_sdk_span()

    def __getattr__(self, name: str) -> Any:
        """Return a method of the SDK's span, such as `set_attribute`."""
        return getattr(self.sdk_span or self._make_sdk_span(), name)

    def get_span_context(self) -> SpanContext:
        """Return the IDs, and what else the services learn that this one calls."""
        if self.ids is None:
            bits = TraceFlags.RANDOM_TRACE_ID
            state = None
            if self.parent:
                bits &= self.parent.trace_flags
                state = self.parent.trace_state
            flags = _TRACE_FLAGS[bits | self.is_recorded]
            trace_id = self.number & _TRACE_ID_BITS
            self.ids = SpanContext(trace_id, self.number >> 128, False, flags, state)
        return self.ids

    def is_recording(self) -> bool:
        """Return whether the request is sampled, and goes on."""
        return self.sdk_span.is_recording() if self.sdk_span else self.is_recorded

    def finish(
        self, scope: Scope, labels: tuple[str, str, int], path: str, error_type: str
    ) -> None:
        """Send it. `labels`: method, route and status, as in the metrics.

        `path` has no passwords. `error_type` is the class of an unhandled exception, or empty.
        """
        method, route, status = labels
        attributes: dict[str, Any] = {
            "http.request.method": method,
            "http.response.status_code": status,
            "url.path": path,
            "url.scheme": scope.get("scheme", ""),
        }
        if scope.get("client"):
            attributes["client.address"] = scope["client"][0]
        name = self.method
        if route != "unmatched":
            attributes["http.route"] = route
            name = f"{method} {route}"
        if status >= 500:
            attributes["error.type"] = error_type or str(status)
        self._send(name, attributes, _FAILED if status >= 500 else _UNSET)

    def _send(self, name: str, attributes: dict[str, Any], status: Status) -> None:
        if self.sdk_span is None:
            self.export.send_request(self, name, attributes, status)
            self.is_recorded = False
            return
        self.sdk_span.update_name(name)
        self.sdk_span.set_attributes(attributes)
        self.sdk_span.set_status(status)
        self.sdk_span.end()

    def _make_sdk_span(self) -> Span:
        if not self.is_recorded:
            return NonRecordingSpan(self.get_span_context())
        # The SDK asks for the ID of a new trace only.
        ids = self.get_span_context()
        self.export.ids.next_trace_id = 0 if self.parent else ids.trace_id
        self.export.ids.next_span_id = ids.span_id
        self.sdk_span = self.export.tracer.start_span(
            self.method, within(self.parent), SpanKind.SERVER, start_time=self.start_ns
        )
        return self.sdk_span


def active_keys() -> dict[str, str]:
    """Return the IDs of the active span, for a log line; empty without one."""
    return _keys(trace.get_current_span())


def is_recording() -> bool:
    """Return whether a span that is started now would be sent."""
    return current is not None and trace.get_current_span().is_recording()


def carrier() -> dict[str, str]:
    """Return `traceparent`, and `tracestate` if any, of the active span; empty without one."""
    return _headers(context.get_current()) if current is not None else {}


def traceparent() -> str | None:
    """Return the active span as W3C's `traceparent`, for a row or a message; None without one."""
    return carrier().get("traceparent")


class ClientSpan:
    """A span around a query or a command: a context manager, cheaper than a generator's."""

    __slots__ = ("span",)

    def __init__(self, name: str, attributes: Mapping[str, Any]) -> None:
        """Start it. Call this only while `is_recording`."""
        assert current is not None  # noqa: S101 - for mypy
        self.span = current.tracer.start_span(name, None, SpanKind.CLIENT, attributes)

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None:
            mark_failed(error, self.span)
        self.span.end()


class HttpCall:
    """One attempt to call another service: its span, and the headers that continue the trace."""

    def __init__(self, method: str, url: str) -> None:
        self.span: Span = trace.INVALID_SPAN
        self.headers: dict[str, str] = {}
        if is_recording():
            assert current is not None  # noqa: S101 - for mypy
            attributes = _url_attributes(url) | {"http.request.method": method}
            self.span = current.tracer.start_span(method, None, SpanKind.CLIENT, attributes)
            self.headers = _headers(trace.set_span_in_context(self.span))
        else:
            self.headers = carrier()

    def end(self, outcome: str) -> None:
        """End the span. `outcome` is the status, or the name of what went wrong."""
        if not self.span.is_recording():
            return
        status = int(outcome) if outcome.isdigit() else 0
        if status:
            self.span.set_attribute("http.response.status_code", status)
        if not 0 < status < 400:
            self.span.set_attribute("error.type", outcome)
            self.span.set_status(_FAILED)
        self.span.end()


def record_send(system: str, topic: str, message_id: str, row: Mapping[str, Any]) -> str | None:
    """Record the way of a message from its row, in `created_at`, until now, when it is sent.

    Returns the `traceparent` that the message carries, in place of the row's.
    """
    written: str | None = row["traceparent"]
    if current is None or written is None:
        return written
    attributes = _message_attributes(system, topic, message_id, "send")
    created_at: datetime = row["created_at"]
    span = current.tracer.start_span(
        f"send {topic}",
        _extract({"traceparent": written}),
        SpanKind.PRODUCER,
        attributes,
        start_time=int(created_at.timestamp() * 1e9),
    )
    span.end()
    return _headers(trace.set_span_in_context(span)).get("traceparent")


@contextlib.contextmanager
def handling(
    system: str, topic: str, message_id: str, written: str | None, group: str = ""
) -> Iterator[None]:
    """Make the handling of a message the active span, in the trace that has written the message.

    A child, not a new trace with a link: at a ratio each trace is sampled alone, and most links
    would lead nowhere. `written` is the message's `traceparent`; without one a trace begins here.
    """
    if current is None:
        yield
        return
    attributes = _message_attributes(system, topic, message_id, "process")
    if group:
        attributes["messaging.consumer.group.name"] = group
    parent = _extract({"traceparent": written} if written else {})
    span = current.tracer.start_span(f"process {topic}", parent, SpanKind.CONSUMER, attributes)
    token = context.attach(trace.set_span_in_context(span))
    try:
        yield
    except BaseException as error:
        mark_failed(error, span)
        raise
    finally:
        context.detach(token)
        span.end()


def mark_failed(error: BaseException | str, span: Span | None = None) -> None:
    """Mark a span, or the active one, as failed.

    By a word, or by the class of the error or its SQLSTATE: its message may quote values.
    """
    span = span or trace.get_current_span()
    kind = error if isinstance(error, str) else _error_type(error)
    span.set_attribute("error.type", kind)
    span.set_status(_FAILED)


def _error_type(error: BaseException) -> str:
    return getattr(error, "sqlstate", None) or type(error).__qualname__


def _caller(scope: Scope) -> SpanContext | None:
    """Return the caller's span by its headers, or None if they are not valid."""
    carrier = {
        name.decode(): value.decode("latin-1")
        for name, value in scope["headers"]
        if name in _W3C_HEADERS
    }
    caller = trace.get_current_span(_extract(carrier)).get_span_context()
    return caller if caller.is_valid else None


def _extract(carrier: Mapping[str, str]) -> context.Context:
    """Return a context whose span is that of the headers; without a valid one it has none."""
    return _W3C.extract(carrier, context.Context())


def _headers(active: context.Context) -> dict[str, str]:
    """Return the headers of the span of a context."""
    headers: dict[str, str] = {}
    _W3C.inject(headers, active)
    return headers


def within(parent: SpanContext | None) -> context.Context:
    """Return a context whose span is the parent, if there is one, and in no case the active one."""
    empty = context.Context()
    return trace.set_span_in_context(NonRecordingSpan(parent), empty) if parent else empty


def _keys(span: Span) -> dict[str, str]:
    ids = span.get_span_context()
    if not ids.is_valid:
        return {}
    return {
        "trace_id": f"{ids.trace_id:032x}",
        "span_id": f"{ids.span_id:016x}",
        "trace_flags": _FLAGS[ids.trace_flags.sampled],
    }


def _url_attributes(url: str) -> dict[str, Any]:
    """Return the attributes of a URL, without its credentials and its query."""
    parts = urlsplit(url)
    location = parts.netloc.rpartition("@")[2]
    attributes: dict[str, Any] = {
        "server.address": parts.hostname or "",
        "url.full": parts._replace(netloc=location, query="", fragment="").geturl(),
    }
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return attributes | ({"server.port": port} if port else {})


def _message_attributes(system: str, topic: str, message_id: str, kind: str) -> dict[str, Any]:
    return {
        "messaging.system": system,
        "messaging.destination.name": topic,
        "messaging.message.id": message_id,
        "messaging.operation.name": kind,
        "messaging.operation.type": kind,
    }
