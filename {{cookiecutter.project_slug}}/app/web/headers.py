"""What is read in the head of a request: its IDs, how long its body is, and whether a proxy speaks for a client."""

import itertools
import os
import re
from collections.abc import Iterable, Iterator

#: What is taken over from a client; anything longer or stranger could forge log lines.
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
#: W3C Trace Context, section 3.2.2: version, trace-id, parent-id, flags; all-zero ids are invalid.
_TRACEPARENT = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}((?<!^00.{53})-.*)?"
)


def generate_request_ids() -> Iterator[str]:
    """Yield request IDs that no other process makes: a random one for each would cost a system call (0.5 us)."""
    prefix = os.urandom(10).hex()
    for number in itertools.count():
        yield f"{prefix}{number:012x}"


def parse_headers(
    headers: Iterable[tuple[bytes, bytes]], request_ids: Iterator[str]
) -> tuple[dict[str, str], int | None, bool]:
    """Return the IDs of the request and of its trace, the length of its body, and whether it has been forwarded.

    The length is 0 if it is not known, and None without a body. In one pass, since each request pays for it.
    """
    context: dict[str, str] = {}
    body_bytes, is_forwarded = None, False
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
            context["trace_id"], context["parent_span_id"] = match[1].decode(), match[2].decode()
    if "request_id" not in context:
        context["request_id"] = next(request_ids)
    return context, body_bytes, is_forwarded
