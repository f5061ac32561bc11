"""The authenticated caller of a request."""

from fastapi import Request


def principal(request: Request) -> str:
    """Return `request.state.principal`, or an empty text if it is not set.

    Authentication sets it. It scopes idempotency keys and rate limits.
    """
    return str(getattr(request.state, "principal", None) or "")
