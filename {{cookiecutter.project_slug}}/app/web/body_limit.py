"""The limit of the body of one route, in place of `MAX_BODY_BYTES`: see docs/uploads.md."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from starlette.routing import BaseRoute
from starlette.types import Scope

from app.settings import Settings, fail
from app.web.routes import endpoints, find_endpoint, routes_of

#: Bodies up to this size are not counted. Starlette keeps a file of a form in memory up to it, and
#: writes a larger one to a temporary file.
SMALL_BYTES = 1 << 20
_ATTRIBUTE = "__max_body__"
Endpoint = TypeVar("Endpoint", bound=Callable[..., object])


class BodyLimit(NamedTuple):
    """The limit of a body: its size, its time, and whether the handler keeps all of it."""

    max_bytes: int
    seconds: float | None
    is_streamed: bool


def max_body(
    max_bytes: int, *, seconds: float | None = None, streamed: bool = False
) -> Callable[[Endpoint], Endpoint]:
    """Set the limits of a route's body. To be written below `@router.post(...)`.

    A declared length over `max_bytes` is rejected with 413 before the body is read, a chunked body
    as soon as it is larger. `seconds` replaces `REQUEST_BODY_TIMEOUT_SECONDS`, and is added to
    `REQUEST_TIMEOUT_SECONDS`.

    With `streamed`, the handler iterates over `request.stream()` and keeps nothing. Otherwise the
    body counts in `MAX_BUFFERED_BYTES` while the request runs.
    """

    def mark(endpoint: Endpoint) -> Endpoint:
        setattr(endpoint, _ATTRIBUTE, BodyLimit(max_bytes, seconds, streamed))
        return endpoint

    return mark


class BodyLimits:
    """The limits of the bodies of an application."""

    def __init__(self, settings: Settings, routes: Sequence[BaseRoute]) -> None:
        self.routes = routes
        self.default = BodyLimit(settings.max_body_bytes, None, is_streamed=False)

    def find(self, scope: Scope) -> BodyLimit:
        """Return the limit of a request. Before it is routed, its route is searched for."""
        endpoint = scope.get("endpoint") or find_endpoint(self.routes, scope)
        limit: BodyLimit = getattr(endpoint, _ATTRIBUTE, self.default)
        return limit


def check_routes(app: object, settings: Settings) -> None:
    """Exit with one line if a route's limit exceeds `MAX_BUFFERED_BYTES`: none would be served."""
    for endpoint in endpoints(routes_of(app)):
        limit: BodyLimit | None = getattr(endpoint, _ATTRIBUTE, None)
        if limit and limit.max_bytes > settings.max_buffered_bytes and not limit.is_streamed:
            name = getattr(endpoint, "__name__", "a route")
            problem = (
                f"must be at least {limit.max_bytes}, the max_body of {name}(); "
                "raise it, or read the body in parts (streamed=True)"
            )
            fail("MAX_BUFFERED_BYTES", settings.max_buffered_bytes, problem)
