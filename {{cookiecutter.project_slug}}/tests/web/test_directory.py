"""`Directory` finds the route that FastAPI's router would choose, without trying the others."""

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Request, WebSocket
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from app.web.directory import Directory, use_directory
from app.web.quick_route import QuickRoute

#: Requests in a block of the measurement, and how many blocks.
BLOCK = 40
BLOCKS = 60


class Routed:
    """An application with a directory, and the number of requests that its router has served."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self.by_router = 0
        original = app.router.app

        async def count(scope: Scope, receive: Receive, send: Send) -> None:
            self.by_router += 1
            await original(scope, receive, send)

        directory = Directory(app.router)
        vars(app.router)["app"] = count
        app.router.middleware_stack = directory

    async def get(self, path: str, method: str = "GET", **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, **options)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path)


def respond(text: str) -> Callable[..., Any]:
    async def handle(request: Request) -> PlainTextResponse:
        return PlainTextResponse(text)

    return handle


def add(router: Any, *paths: str, text: str = "") -> None:
    """Add routes that respond with their path, or with a text."""
    for path in paths:
        router.add_api_route(path, respond(text or path), methods=["GET"])


async def test_full_match_is_served_without_the_router() -> None:
    app = FastAPI()
    nested = APIRouter(prefix="/nested")
    outer = APIRouter(prefix="/outer")
    add(app, "/", "/a", "/a/{x}", "/v1/items/{x}", "/v1/items/{x}/parts", "/{x}")
    add(nested, "", "/{x}")
    outer.include_router(nested)
    app.include_router(outer)
    app.add_route("/plain/{x}", respond("plain"))
    routed = Routed(app)
    expected = {
        "/": "/",
        "/a": "/a",
        "/a/1": "/a/{x}",
        "/v1/items/1": "/v1/items/{x}",
        "/v1/items/1/parts": "/v1/items/{x}/parts",
        "/other": "/{x}",
        "/outer/nested": "",
        "/outer/nested/1": "/{x}",
        "/plain/1": "plain",
        "/docs": None,
    }
    for path, text in expected.items():
        response = await routed.get(path)
        assert response.status_code == 200, path
        assert text is None or response.text == text
    assert routed.by_router == 0


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404),
        ("POST", "/a", 405),
        ("GET", "/a/", 307),
        ("GET", "/mounted/b", 200),
        ("HEAD", "/a", 405),
    ],
)
async def test_all_else_is_left_to_the_router(method: str, path: str, status: int) -> None:
    app = FastAPI()
    add(app, "/a")
    app.mount("/mounted", Mount("", routes=[Route("/b", respond("b"))]))
    routed = Routed(app)
    response = await routed.get(path, method)
    assert response.status_code == status
    assert routed.by_router == 1


async def test_order_of_routes_is_that_of_the_router() -> None:
    """The first match wins: a literal, a parameter, a mount, whichever was added first."""
    app = FastAPI()
    add(app, "/a/fixed", "/{first}/{x}", "/b/fixed", "/a/{x}")
    app.mount("/c", FastAPI())
    add(app, "/c/{x}", "/{path:path}")
    routed = Routed(app)
    expected = {
        "/a/fixed": "/a/fixed",
        "/a/1": "/{first}/{x}",
        "/b/fixed": "/{first}/{x}",
        "/b/1/2/3": "/{path:path}",
        "/c/1": "/{first}/{x}",
    }
    for path, text in expected.items():
        assert (await routed.get(path)).text == text
    assert routed.by_router == 0
    assert (await routed.get("/c/1/2")).status_code == 404  # the mount's, before the last route
    assert routed.by_router == 1


async def test_newline_at_the_end_of_a_path_matches_as_in_the_router() -> None:
    """`$` of Starlette's patterns matches before it."""
    app = FastAPI()
    add(app, "/a", "/{x}")
    assert (await Routed(app).get("/a%0A")).text == "/a"


async def test_root_path_is_removed() -> None:
    app = FastAPI()
    add(app, "/a", "/{x}/b")
    routed = Routed(app)
    assert (await routed.get("/prefix/a", root_path="/prefix")).text == "/a"
    assert (await routed.get("/prefix/a/b", root_path="/prefix")).text == "/{x}/b"
    assert (await routed.get("/prefix", root_path="/prefix")).status_code == 404
    assert routed.by_router == 1


async def test_routes_added_later_are_served_in_their_order() -> None:
    """A router that is included first is asked first, also for what is added to it later."""
    app = FastAPI()
    first = APIRouter(prefix="/a")
    nested = APIRouter()
    add(first, "/x")
    first.include_router(nested, prefix="/nested")
    app.include_router(first)
    add(app, "/a/{x}", "/a/nested/{x}")
    routed = Routed(app)
    assert (await routed.get("/a/late")).text == "/a/{x}"
    add(first, "/late")
    assert (await routed.get("/a/late")).text == "/late"
    assert (await routed.get("/a/nested/late")).text == "/a/nested/{x}"
    add(nested, "/late")
    assert (await routed.get("/a/nested/late")).text == "/late"
    add(app, "/later")
    assert (await routed.get("/later")).text == "/later"
    app.router.routes.insert(0, Route("/{any}", respond("inserted")))
    assert (await routed.get("/later")).text == "inserted"
    app.router.routes = app.router.routes[1:]
    assert (await routed.get("/later")).text == "/later"
    assert routed.by_router == 0


async def test_websockets_are_left_to_the_router() -> None:
    app = FastAPI()
    add(app, "/both")
    messages: list[Any] = []

    @app.websocket("/both")
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        messages.append(message["type"])

    routed = Routed(app)
    scope = {"type": "websocket", "path": "/both", "headers": [], "query_string": b""}
    await app(scope, receive, send)
    assert messages == ["websocket.accept", "websocket.close"]
    assert routed.by_router == 1
    assert (await routed.get("/both")).text == "/both"
    assert routed.by_router == 1


async def test_telemetry_of_fastapi_is_left_to_the_router() -> None:
    app = FastAPI()
    add(app, "/a")
    routed = Routed(app)

    async def with_telemetry(scope: Scope, receive: Receive, send: Send) -> None:
        scope["fastapi.telemetry"] = object()
        await app(scope, receive, send)

    transport = httpx.ASGITransport(with_telemetry)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/a")).text == "/a"
    assert routed.by_router == 1


# In front of Starlette's layers


class AnyMiddleware:
    """A middleware of an application, which notes what it has around it."""

    def __init__(self, app: ASGIApp, seen: list[str]) -> None:
        self.app = app
        self.seen = seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen.append(scope["path"])
        await self.app(scope, receive, send)


async def get_response(app: FastAPI, path: str) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.get(path)


async def test_middleware_of_the_application_is_around_the_directory() -> None:
    app = FastAPI()
    use_directory(app)
    seen: list[str] = []
    app.add_middleware(AnyMiddleware, seen=seen)
    add(app, "/a")
    assert (await get_response(app, "/a")).text == "/a"
    assert (await get_response(app, "/nope")).status_code == 404
    assert seen == ["/a", "/nope"]


async def test_exception_middleware_of_an_agent_sees_every_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sentry's integration of Starlette replaces its `__call__`."""
    original = ExceptionMiddleware.__call__
    seen: list[str] = []

    async def note(self: ExceptionMiddleware, scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["path"])
        await original(self, scope, receive, send)

    monkeypatch.setattr(ExceptionMiddleware, "__call__", note)
    app = FastAPI()
    use_directory(app)
    add(app, "/a")
    assert (await get_response(app, "/a")).text == "/a"
    assert seen == ["/a"]


@pytest.mark.parametrize("compress", ["identity", "gzip"])
@pytest.mark.parametrize("path", ["/quick", "/class"])
async def test_stream_that_fails_is_not_completed_by_a_handler(path: str, compress: str) -> None:
    """A middleware that buffers the start of a response would take the handler's as its end."""
    app = FastAPI()
    use_directory(app)
    app.add_middleware(GZipMiddleware)

    @app.exception_handler(LookupError)
    async def handle(_: Request, __: Exception) -> PlainTextResponse:
        return PlainTextResponse("lost", 503)

    async def stream() -> StreamingResponse:
        return StreamingResponse(fail_after_a_chunk())

    class Streaming(HTTPEndpoint):
        async def get(self, _: Request) -> StreamingResponse:
            return await stream()

    quick = APIRouter(route_class=QuickRoute)
    quick.add_api_route("/quick", stream)
    app.include_router(quick)
    endpoint: Any = Streaming
    app.add_route("/class", endpoint)
    transport = httpx.ASGITransport(app)
    headers = {"Accept-Encoding": compress}
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        with pytest.raises(LookupError):
            await client.get(path, headers=headers)


async def fail_after_a_chunk() -> AsyncIterator[str]:
    yield "row"
    raise LookupError


async def test_error_of_a_served_application_has_the_handlers_of_the_one_around_it() -> None:
    async def fail(*_: Any) -> None:
        raise LookupError

    class Failing(Starlette):
        """An application that fails outside of its own handlers."""

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            scope["starlette.exception_handlers"] = ({}, {})
            await fail()

    app = FastAPI()
    use_directory(app)

    @app.exception_handler(LookupError)
    async def handle(_: Request, __: Exception) -> PlainTextResponse:
        return PlainTextResponse("lost", 503)

    inner: Any = Failing()
    app.add_route("/inner", inner)
    assert (await get_response(app, "/inner")).status_code == 503


# The price


@pytest.mark.parametrize("prefix", ["", "/api/v1"])
async def test_last_of_100_routes_costs_as_much_as_the_first(prefix: str) -> None:
    """At most 1.3 times: the least of many alternating blocks of CPU. FastAPI's own: 5 times."""
    app = FastAPI()
    for number in range(10):
        router = APIRouter(prefix=f"/resource{number}")
        add(router, *(f"/r{each}" + "/{x}" for each in range(10)))
        app.include_router(router, prefix=prefix)
    Routed(app)
    costs: dict[str, list[int]] = {}
    for _ in range(BLOCKS):
        for path in ("/resource0/r0/1", "/resource9/r9/1"):
            costs.setdefault(path, []).append(await block_cost(app, prefix + path))
    first, last = (min(each) for each in costs.values())
    assert last < first * 1.3


async def block_cost(app: FastAPI, path: str) -> int:
    """Return the nanoseconds of CPU of a block of requests."""

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None: ...

    scope = {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b""}
    start = time.thread_time_ns()
    for _ in range(BLOCK):
        await app(dict(scope), receive, send)
    return time.thread_time_ns() - start
