"""The IDs of the request that is being served: in every log line, in every problem, in every call of another service."""

from contextvars import ContextVar

#: What every line written during a request carries: `request_id`, and the ids of the trace if there is one.
request_context: ContextVar[dict[str, str] | None] = ContextVar("request_context", default=None)


def request_id() -> str:
    """Return the ID of the request that is being served, or an empty text outside of one."""
    return (request_context.get() or {}).get("request_id", "")
