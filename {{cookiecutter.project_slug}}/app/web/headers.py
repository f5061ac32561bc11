"""Parses the headers that every request needs: its IDs, its host, its body, its proxies."""

import ipaddress
import itertools
import os
import re
from collections.abc import Iterator
from functools import lru_cache

from starlette.types import Scope

from app.web.limits import REJECTED_STATUS

_FORWARDED = frozenset({b"x-forwarded-for", b"x-forwarded-proto"})
_IDS = frozenset({b"traceparent", b"x-request-id"})
#: The fields that are parsed; one look-up passes over the others.
_PARSED = frozenset({b"content-length", b"host", b"transfer-encoding"}) | _FORWARDED | _IDS
#: RFC 3986, section 3.2.2: an address in brackets, or a name; then a port.
_HOST = re.compile(
    rb"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|\[[vV][0-9A-Fa-f]+\.[A-Za-z0-9._~!$&'()*+,;=:-]+\]"
    rb"|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*)(?::[0-9]*)?"
)
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
    scope: Scope, request_ids: Iterator[str]
) -> tuple[dict[str, str], int | None, bool]:
    """Return what the middleware needs: context, length of the body, whether it is forwarded.

    The context has `request_id`, and `trace_id` with `parent_span_id` if the client sent them. The
    length is 0 if it is not known, None without a body. One pass, since each request pays for it.

    A request whose host or coding is wrong is marked as rejected.
    """
    context = {"request_id": ""}
    body_bytes = None
    is_forwarded = False
    hosts = 0
    for name, value in scope["headers"]:
        if name not in _PARSED:
            continue
        if name == b"host":
            hosts += 1 if is_valid_host(value) else 2
        elif name == b"content-length" and value.isdigit():
            body_bytes = int(value) or None
        elif name == b"transfer-encoding":
            body_bytes = 0
            _reject_other_codings(scope, value)
        elif name in _FORWARDED:
            is_forwarded = True
        else:
            _parse_id(name, value, context)
    if hosts != 1:
        _reject_hosts(scope, hosts)
    context["request_id"] = context["request_id"] or next(request_ids)
    return context, body_bytes, is_forwarded


def _parse_id(name: bytes, value: bytes, context: dict[str, str]) -> None:
    if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
        context["request_id"] = value.decode()
    elif name == b"traceparent" and (match := _TRACEPARENT.fullmatch(value)):
        context["trace_id"] = match[1].decode()
        context["parent_span_id"] = match[2].decode()


@lru_cache(maxsize=256)
def is_valid_host(value: bytes) -> bool:
    """Return whether this is a valid `Host` (RFC 9112, section 3.2); an empty one is."""
    match = _HOST.fullmatch(value)
    if match is None:
        return False
    if match["address"] is None:
        return True
    try:
        ipaddress.IPv6Address(match["address"].decode())
    except ValueError:
        return False
    return True


def _reject_hosts(scope: Scope, hosts: int) -> None:
    """Mark the request as rejected unless it is HTTP/1.0, which may have no host."""
    if hosts or scope["http_version"] != "1.0":
        scope["state"].setdefault(REJECTED_STATUS, 400)


def _reject_other_codings(scope: Scope, value: bytes) -> None:
    """Mark the request as rejected unless its only coding is `chunked` (RFC 9112, section 6.1)."""
    if value.lower() != b"chunked":
        scope["state"].setdefault(REJECTED_STATUS, 501)
