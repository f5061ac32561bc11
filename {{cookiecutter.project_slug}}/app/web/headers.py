"""Parses the headers that every request needs: its IDs, its body, its proxies."""

import itertools
import os
import re
from collections.abc import Iterable, Iterator

#: Request IDs accepted from a client. Anything longer or stranger could forge log lines.
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
#: W3C Trace Context, section 3.2.2: version, trace-id, parent-id, flags; all-zero IDs are invalid.
_TRACEPARENT = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})"
    rb"-[0-9a-f]{2}((?<!^00.{53})-.*)?"
)


def generate_request_ids() -> Iterator[str]:
    """Yield request IDs that no other process generates.

    A random prefix and a counter: a random ID each would cost a system call (0.5 us).
    """
    prefix = os.urandom(10).hex()
    for number in itertools.count():
        yield f"{prefix}{number:012x}"


def parse_headers(
    headers: Iterable[tuple[bytes, bytes]], request_ids: Iterator[str]
) -> tuple[dict[str, str], int | None, bool]:
    """Return what the middleware needs: context, length of the body, whether it is forwarded.

    The context has `request_id`, and `trace_id` with `parent_span_id` if the client sent them. The
    length is 0 if it is not known, None without a body. One pass, since each request pays for it.
    """
    context: dict[str, str] = {}
    body_bytes = None
    is_forwarded = False
    for name, value in headers:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            context["request_id"] = value.decode()
        elif name == b"content-length" and value.isdigit():
            body_bytes = int(value) or None
        elif name == b"transfer-encoding":
            body_bytes = 0
        elif name in {b"x-forwarded-for", b"x-forwarded-proto"}:
            is_forwarded = True
        elif name == b"traceparent" and (match := _TRACEPARENT.fullmatch(value)):
            context["trace_id"] = match[1].decode()
            context["parent_span_id"] = match[2].decode()
    if "request_id" not in context:
        context["request_id"] = next(request_ids)
    return context, body_bytes, is_forwarded
