"""The IDs of the current request.

They are in every log line, in every problem, and in every call of another service.
"""

from collections.abc import Callable
from contextvars import ContextVar

#: The keys that every log line of a request has: `request_id`, and the IDs of the trace if any.
request_context: ContextVar[dict[str, str] | None] = ContextVar("request_context", default=None)
#: Return the keys of the active span: none, unless tracing.py replaces this function.
span_keys: Callable[[], dict[str, str]] = dict


def request_id() -> str:
    """Return the ID of the current request, or an empty string outside of one."""
    context = request_context.get() or {}
    return context.get("request_id", "")


def log_keys() -> dict[str, str]:
    """Return the keys of a log line: those of the request, and of the active span."""
    return {**(request_context.get() or {}), **span_keys()}
