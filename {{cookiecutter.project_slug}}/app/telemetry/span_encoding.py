"""Encodes spans for OpenTelemetry's exporter, in a third of the time of its own encoder.

Both use the same classes of protobuf. OpenTelemetry's encoder makes each message out of others, and
protobuf copies a message into another by encoding and decoding it. Here each is made in its place,
and the attributes that many spans share, such as the method of a request, are encoded once.
"""

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import ScopeSpans, Span, SpanFlags
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.util.types import AttributeValue

#: After this number of spans other threads get a turn, such as that of the event loop. It would
#: wait for 5 ms otherwise (`sys.getswitchinterval`): p99 at 10 % sampled is 2.9 ms, not 4.0.
SPANS_PER_TURN = 64
_VALUES = {str: "string_value", bool: "bool_value", int: "int_value", float: "double_value"}
_HAS_FLAG = SpanFlags.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK
_REMOTE_PARENT = _HAS_FLAG | SpanFlags.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK
#: The attributes that are kept encoded.
CACHED_ATTRIBUTES = 256
#: The longest text that is kept: a long path is rarely that of the next request.
MAX_CACHED_CHARACTERS = 256


def encode(spans: Sequence[ReadableSpan]) -> ExportTraceServiceRequest:
    """Return a request with these spans, grouped by their process and their library."""
    request = ExportTraceServiceRequest()
    groups: dict[tuple[int, int], ScopeSpans] = {}
    for number, span in enumerate(spans):
        if number % SPANS_PER_TURN == 0:
            time.sleep(0)
        key = (id(span.resource), id(span.instrumentation_scope))
        if key in groups:
            _add(span, groups[key])
        else:
            request.MergeFrom(encode_spans([span]))
            groups[key] = request.resource_spans[-1].scope_spans[0]
    return request


def _add(span: ReadableSpan, group: ScopeSpans) -> None:
    """Add a span; by OpenTelemetry's encoder if it has events, links, lists or invalid values."""
    attributes = None
    if not span.events and not span.links:
        attributes = _encode_attributes(span)
    if attributes is None:
        group.spans.extend(encode_spans([span]).resource_spans[0].scope_spans[0].spans)
    else:
        _set_fields(span, group.spans.add(), attributes)


def _encode_attributes(span: ReadableSpan) -> bytes | None:
    """Return the attributes as a part of the span's message; None if this is not possible."""
    try:
        return b"".join([_encode(*each) for each in (span.attributes or {}).items()])
    except (KeyError, TypeError, ValueError):
        return None


def _encode(key: str, value: AttributeValue) -> bytes:
    """Encode an attribute, once if many spans may share it. Long values would fill the memory."""
    is_long = isinstance(value, str) and len(value) > MAX_CACHED_CHARACTERS
    return _encode_attribute(key, value) if is_long else _encode_once(key, value)


def _encode_attribute(key: str, value: AttributeValue) -> bytes:
    """Return a span's message that has only this attribute.

    Raises `KeyError` for a value of another type, `TypeError` for a list, `ValueError` for a value
    that protobuf rejects.
    """
    message = Span()
    attribute = message.attributes.add(key=key)
    setattr(attribute.value, _VALUES[type(value)], value)
    return bytes(message.SerializeToString())


_encode_once = lru_cache(CACHED_ATTRIBUTES, typed=True)(_encode_attribute)


def _set_fields(span: ReadableSpan, message: Any, attributes: bytes) -> None:
    """Set the fields of a new message. Those that are not set are 0 or empty."""
    # Encoded messages, one after the other, are those of the merged message (protobuf, "Encoding").
    message.MergeFromString(attributes)
    ids = span.context
    message.trace_id = ids.trace_id.to_bytes(16)
    message.span_id = ids.span_id.to_bytes(8)
    if ids.trace_state:
        message.trace_state = ids.trace_state.to_header()
    parent = span.parent
    if parent:
        message.parent_span_id = parent.span_id.to_bytes(8)
    message.flags = _REMOTE_PARENT if parent and parent.is_remote else _HAS_FLAG
    message.name = span.name
    # OpenTelemetry's numbers begin at 0; in OTLP that means that it is not known.
    message.kind = span.kind.value + 1
    message.start_time_unix_nano = span.start_time
    message.end_time_unix_nano = span.end_time
    message.dropped_attributes_count = span.dropped_attributes
    message.dropped_events_count = span.dropped_events
    message.dropped_links_count = span.dropped_links
    message.status.code = span.status.status_code.value
    if span.status.description:
        message.status.message = span.status.description
