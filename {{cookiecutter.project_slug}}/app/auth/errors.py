"""The responses to a request that is not authenticated, or may not do this (RFC 6750, section 3).

No detail quotes the token, nor what it says: a client that guesses learns nothing.
"""

from collections.abc import Iterable

from prometheus_client import Counter

from app.errors import ForbiddenError, ServiceError, UnauthorizedError, UnavailableError

#: Why requests are rejected, in the metric.
REASONS = (
    *("missing", "ambiguous", "malformed", "algorithm", "type", "unknown_key", "signature"),
    *("issuer", "audience", "expired", "not_yet_valid", "claims", "scope", "keys_unavailable"),
)
_REJECTED = Counter(
    "auth_rejected_requests", "Requests that are not authenticated, or may not do this.", ["reason"]
)


def start_counting() -> None:
    """Have the counters begin with 0."""
    for reason in REASONS:
        _REJECTED.labels(reason)


class MissingTokenError(UnauthorizedError):
    """The request has no token: 401 without an error code, as RFC 6750, section 3.1, requires."""

    def __init__(self, realm: str) -> None:
        _REJECTED.labels("missing").inc()
        super().__init__("Send a bearer token.", f'Bearer realm="{realm}"')


class InvalidTokenError(UnauthorizedError):
    """The token is expired, not for this service, or not of the issuer: 401."""

    code = "invalid_token"

    def __init__(self, realm: str, reason: str, detail: str) -> None:
        _REJECTED.labels(reason).inc()
        challenge = _challenge(realm, "invalid_token", detail)
        super().__init__(detail, challenge)


class AmbiguousTokenError(ServiceError):
    """The request has more than one token: 400."""

    status = 400
    code = "invalid_request"

    def __init__(self, realm: str) -> None:
        _REJECTED.labels("ambiguous").inc()
        detail = "Send one token, in one Authorization header."
        challenge = _challenge(realm, "invalid_request", detail)
        super().__init__(detail, {"WWW-Authenticate": challenge})


class InsufficientScopeError(ForbiddenError):
    """The token does not have the scopes of this route: 403."""

    code = "insufficient_scope"

    def __init__(self, realm: str, scopes: Iterable[str]) -> None:
        _REJECTED.labels("scope").inc()
        required = " ".join(sorted(scopes))
        detail = f"This needs a token with the scope: {required}"
        challenge = _challenge(realm, "insufficient_scope", detail)
        super().__init__(detail, {"WWW-Authenticate": f'{challenge}, scope="{required}"'})


class KeysUnavailableError(UnavailableError):
    """The key of the token is not known, and the provider does not respond: 503."""

    def __init__(self, retry_after_seconds: int) -> None:
        _REJECTED.labels("keys_unavailable").inc()
        super().__init__("The keys of the identity provider are not known.", retry_after_seconds)


def _challenge(realm: str, error: str, description: str) -> str:
    return f'Bearer realm="{realm}", error="{error}", error_description="{description}"'
