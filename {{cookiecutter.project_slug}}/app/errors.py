"""The errors that a client is told about: raise one of them anywhere, and web/problems.py answers it."""

from collections.abc import Mapping

from starlette.exceptions import HTTPException


class ServiceError(HTTPException):
    """The root of the errors that a client is told about. `detail` is public: never a secret, never input."""

    status = 500

    def __init__(self, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(self.status, detail, headers)


class NotFoundError(ServiceError):
    """What the path names does not exist: 404."""

    status = 404


class UnavailableError(ServiceError):
    """The service cannot serve this now, but a retry may succeed: 503 with `Retry-After`."""

    status = 503

    def __init__(self, detail: str, retry_after_seconds: int = 1) -> None:
        super().__init__(detail, {"Retry-After": str(retry_after_seconds)})
