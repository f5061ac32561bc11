"""The errors that clients see. Raise one anywhere; `web/problems.py` turns it into a response."""

from collections.abc import Mapping

from starlette.exceptions import HTTPException


class ServiceError(HTTPException):
    """The root of the errors that clients see.

    `detail` is public: it must never contain a secret, nor what the client sent.
    """

    status = 500

    def __init__(self, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(self.status, detail, headers)


class NotFoundError(ServiceError):
    """The resource that the path names does not exist: 404."""

    status = 404


class UnavailableError(ServiceError):
    """The service cannot handle this request now; a retry may succeed: 503 with `Retry-After`."""

    status = 503

    def __init__(self, detail: str, retry_after_seconds: int = 1) -> None:
        super().__init__(detail, {"Retry-After": str(retry_after_seconds)})
