"""`QuickRoute` calls the functions of a route by a plan, and leaves to FastAPI what it cannot plan.

test_same_responses.py shows that the responses are the same. Here: which routes it serves.
"""

from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response, routing
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from app.main import create_app
from app.settings import Settings
from app.web.directory import Directory
from app.web.quick_route import QuickRoute, quick_app
from tests.web import every_route
from tests.web.every_route import OwnError

#: The routes of `every_route` that it serves: all of their functions are coroutine functions, or
#: objects with one, and need the request and its parameters only.
QUICK = {
    *("/", "/model/{number}", "/filtered/{number}", "/invalid-result", "/untyped", "/nothing"),
    *("/infinite", "/response", "/response-of-model", "/stream", "/status", "/http-error"),
    *("/own-error", "/translated-error", "/bug", "/query", "/query-model", "/header", "/cookie"),
    *("/object", "/bearer", "/key"),
    *("/uuid/{id}/deep/{number}", "/file/{path:path}", "/converted/{number:int}", "/raw", "/many"),
    *("/many/{name}", "/many/fixed", "/by-request/{number}", "/nested/{number}"),
    *("/authenticated/{number}", "/nested-authenticated", "/twice", "/decorated/{number}"),
    *("/body", "/picky-body", "/list-body", "/default-body", "/any-body", "/bytes-body"),
    *("/body-of-dependency/{number}", "/body-of-both"),
    *("/partial", "/no-scopes", "/{first}/picky", "/mounted/late", "/socket"),
    *("/v1/outer/inner/{number}", "/v1/outer/inner/fixed/path", "/v1/outer/inner/deepest"),
    *("/v1/outer/inner/deepest/slash/", "/v1/outer/inner/deepest/{name}/deep"),
}


def served_by_plan(app: FastAPI) -> set[str]:
    """Return the paths whose routes all have handlers that are not FastAPI's."""
    paths: set[str] = set()
    others: set[str] = set()
    for found in iter_route_contexts(app.routes):
        if isinstance(found.original_route, QuickRoute):
            handler = handler_of(found)
            is_quick = "_QuickHandler" in handler.__qualname__
            (paths if is_quick else others).add(str(found.path))
    return paths - others


def handler_of(route: Any) -> Any:
    """Return the function that handles a request of a route: `request_response` closes over it."""
    cells = dict(zip(route.app.__code__.co_freevars, route.app.__closure__, strict=True))
    return cells["f"].cell_contents


def test_simple_routes_are_served_by_a_plan() -> None:
    found = served_by_plan(every_route.create(is_quick=True))
    parts = ("/open/", "/{tenant}/", "/inner/")
    assert {path for path in found if not path.startswith(parts)} == QUICK


def test_routes_of_the_service_are_served_by_a_plan(settings: Settings) -> None:
    found = served_by_plan(create_app(settings))
    assert found >= {"/", "/health/live", "/health/startup", "/health/ready"}
    assert {"/payments/{payment_id}", "/payments"} <= found  # example


async def reject(request: Request) -> str:
    """Reject a request without a key."""
    if "x-key" not in request.headers:
        raise HTTPException(401)
    return request.headers["x-key"]


async def through(key: Annotated[str, Depends(reject)]) -> str:
    """Depend on the key."""
    return key


DEPENDENCIES = [Depends(reject)]
NESTED = [Depends(through)]


@pytest.mark.parametrize("dependencies", [DEPENDENCIES, NESTED])
@pytest.mark.parametrize(
    "place", ["application", "router", "outer router", "include", "route", "argument"]
)
async def test_authentication_is_called_from_each_place(
    place: str, dependencies: list[Any]
) -> None:
    """In each, FastAPI calls the dependency; a plan without it would let everybody in."""

    def at(here: str) -> list[Any]:
        return dependencies if place == here else []

    app = FastAPI(dependencies=at("application"))
    router = APIRouter(route_class=QuickRoute, dependencies=at("router"))
    outer = APIRouter(dependencies=at("outer router"))

    async def open_(name: str) -> str:
        return name

    async def locked(name: str, _: Annotated[str, dependencies[0]]) -> str:
        return name

    endpoint = locked if place == "argument" else open_
    router.add_api_route("/{name}", endpoint, dependencies=at("route"))
    outer.include_router(router, dependencies=at("include"))
    app.include_router(outer)
    assert served_by_plan(app) == {"/{name}"}
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/a")).status_code == 401
        assert (await client.get("/a", headers={"X-Key": "k"})).json() == "a"


def test_handler_that_an_agent_wraps_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentry's integration replaces `get_request_handler`, to name its transactions."""
    original = routing.get_request_handler

    def wrapping(*args: Any, **options: Any) -> Any:
        handler = original(*args, **options)

        async def wrapped(request: Request) -> Any:
            return await handler(request)

        return wrapped

    monkeypatch.setattr(routing, "get_request_handler", wrapping)
    app = FastAPI()
    app.router.add_api_route("/a", through, route_class_override=QuickRoute)
    route: Any = app.routes[-1]
    assert isinstance(route, APIRoute)
    assert handler_of(route).__name__ == "wrapped"


def add_route(router: APIRouter, route_class: type[APIRoute] = QuickRoute) -> Any:
    """Add a route; return it."""
    router.add_api_route("/a", through, route_class_override=route_class)
    return router.routes[-1]


def test_plan_has_an_application_of_its_own() -> None:
    """Of a route of the application, and of a router that it includes."""
    app = FastAPI()
    route = add_route(app.router)
    assert quick_app(route, route.app)
    router = APIRouter()
    add_route(router)
    app.include_router(router, prefix="/v1")
    included = list(iter_route_contexts(app.routes))[-1]
    assert quick_app(included.original_route, included.app)


class Timed(QuickRoute):
    """A route as in FastAPI's "Custom Request and APIRoute class": its handler does more."""

    def get_route_handler(self) -> Any:
        """Return the handler with something around it."""
        handler = super().get_route_handler()

        async def timed(request: Request) -> Any:
            return await handler(request)

        return timed


class Counted(QuickRoute):
    """A route with something around FastAPI's method."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        await super().handle(scope, receive, send)


@pytest.mark.parametrize("route_class", [Timed, Counted, APIRoute])
def test_routes_of_other_classes_have_no_application_of_a_plan(route_class: type[APIRoute]) -> None:
    route = add_route(APIRouter(), route_class)
    assert quick_app(route, route.app) is None


def test_application_that_is_wrapped_is_used() -> None:
    route = add_route(APIRouter())

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        await route.app(scope, receive, send)

    assert quick_app(route, wrapped) is None


@pytest.mark.parametrize("owner", [APIRoute, Route])
def test_method_that_an_agent_wraps_is_used(
    monkeypatch: pytest.MonkeyPatch, owner: type[Route]
) -> None:
    """ddtrace's integrations wrap `handle`, to name their spans."""
    original = owner.handle

    async def wrapped(self: Route, scope: Scope, receive: Receive, send: Send) -> None:
        await original(self, scope, receive, send)

    monkeypatch.setattr(owner, "handle", wrapped)
    route = add_route(APIRouter())
    assert quick_app(route, route.app) is None


async def test_handlers_of_exceptions_get_the_request_of_the_route() -> None:
    """So they can read a body that the route has read."""
    app = FastAPI()
    app.router.middleware_stack = Directory(app.router)

    async def fail(request: Request) -> None:
        await request.body()
        raise OwnError

    @app.exception_handler(OwnError)
    async def respond(request: Request, _: Exception) -> Response:
        return Response(await request.body())

    app.router.add_api_route("/a", fail, methods=["POST"], route_class_override=QuickRoute)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.post("/a", content=b"body")).content == b"body"


async def test_plan_opens_no_exit_stacks(settings: Settings) -> None:
    """FastAPI's routes of the same application have them, to close files and dependencies."""
    app = create_app(settings)
    scopes: list[Scope] = []

    async def note(request: Request) -> None:
        scopes.append(request.scope)

    app.router.add_api_route("/quick", note, route_class_override=QuickRoute)
    app.router.add_api_route("/plain", note)
    stack = app.build_middleware_stack()
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(stack), base_url="http://test"
    ) as client:
        assert (await client.get("/plain")).status_code == 200
        assert (await client.get("/quick")).status_code == 200
    plain, quick = scopes
    assert "fastapi_middleware_astack" in plain
    assert "fastapi_middleware_astack" not in quick
    assert "fastapi_inner_astack" not in quick


async def test_dependencies_are_not_called_twice_by_an_invalid_request() -> None:
    """The plan validates all parameters before it calls a function."""
    calls: list[str] = []

    async def counted() -> None:
        calls.append("counted")

    async def endpoint(number: int) -> int:
        return number

    app = FastAPI()
    app.router.add_api_route(
        "/{number}", endpoint, dependencies=[Depends(counted)], route_class_override=QuickRoute
    )
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/x")).status_code == 422
    assert calls == ["counted"]


class Switched:
    """A dependency without an effect while the `lock` of the state is None."""

    switch = "lock"

    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self, request: Request) -> int:
        """Count the calls."""
        self.calls += 1
        return self.calls


class Inherited(Switched):
    """It has no switch of its own."""


@pytest.mark.parametrize("state", [{}, {"lock": None}, {"lock": "on"}])
async def test_dependency_is_omitted_while_its_switch_is_off(state: dict[str, Any]) -> None:
    """Unless its result is an argument, or it is a subclass, whose method may do more.

    A state that knows nothing of the switch has not been set up: the dependency is called.
    """
    omitted = Switched()
    argument = Switched()
    inherited = Inherited()

    async def endpoint(calls: Annotated[int, Depends(argument)], number: int) -> list[int]:
        return [calls, number]

    app = FastAPI()
    app.router.add_api_route(
        "/{number}",
        endpoint,
        dependencies=[Depends(omitted), Depends(inherited)],
        route_class_override=QuickRoute,
    )
    assert served_by_plan(app) == {"/{number}"}

    async def with_state(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "state": dict(state)}, receive, send)

    transport = httpx.ASGITransport(with_state)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/7")).json() == [1, 7]
    assert omitted.calls == (0 if state == {"lock": None} else 1)
    assert (argument.calls, inherited.calls) == (1, 1)
