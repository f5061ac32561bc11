"""The errors that clients see. Raise one anywhere; `web/problems.py` turns it into a response."""

from collections.abc import Mapping
from typing import ClassVar

from starlette.exceptions import HTTPException


class ServiceError(HTTPException):
    """The root of the errors that clients see. A feature derives its own from one of the others.

    `detail` is public: it must never contain a secret, nor what the client sent. An error that is
    raised `from` another hides that from clients; of a 5xx it is logged, once.
    """

    status = 500
    #: Identifies the error to programs; clients must not parse `detail` (RFC 9457, section 3.1.4).
    code: ClassVar[str | None] = None
    #: The URI of a page that describes the error, and its title (RFC 9457, section 3.1.1). Without
    #: a page, the status is the type.
    type: ClassVar[str] = "about:blank"
    title: ClassVar[str | None] = None

    def __init__(self, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(self.status, detail, headers)


class UnauthorizedError(ServiceError):
    """The request has no valid credentials: 401.

    `challenge` describes how to authenticate, such as `Bearer realm="orders"`. A 401 without it is
    invalid (RFC 9110, section 15.5.2).
    """

    status = 401
    code = "unauthorized"

    def __init__(self, detail: str, challenge: str) -> None:
        super().__init__(detail, {"WWW-Authenticate": challenge})


class ForbiddenError(ServiceError):
    """The client is known, and may not do this: 403."""

    status = 403
    code = "forbidden"


class NotFoundError(ServiceError):
    """The resource that the path names does not exist: 404."""

    status = 404
    code = "not_found"


class ConflictError(ServiceError):
    """The state of the resource does not allow this: 409."""

    status = 409
    code = "conflict"


class PreconditionFailedError(ServiceError):
    """The resource is not what `If-Match` expects, since another has changed it: 412."""

    status = 412
    code = "precondition_failed"


class InvalidRequestError(ServiceError):
    """The request can be read, and makes no sense: 422, as for a body that is not valid."""

    status = 422
    code = "invalid_request"


class TooManyRequestsError(ServiceError):
    """The client has sent more than it may: 429 with `Retry-After`, and with other `headers`."""

    status = 429
    code = "too_many_requests"

    def __init__(
        self, detail: str, retry_after_seconds: int, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail, {"Retry-After": str(retry_after_seconds), **(headers or {})})


class UnavailableError(ServiceError):
    """The service cannot handle this request now; a retry may succeed: 503 with `Retry-After`."""

    status = 503
    code = "unavailable"

    def __init__(self, detail: str, retry_after_seconds: int = 1) -> None:
        super().__init__(detail, {"Retry-After": str(retry_after_seconds)})
