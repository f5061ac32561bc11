"""An application with every kind of route, by FastAPI alone or with the service's own routing."""

from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from functools import partial, wraps
from typing import Annotated, Any
from uuid import UUID

from fastapi import (
    APIRouter,
    BackgroundTasks,
    Body,
    Cookie,
    Depends,
    FastAPI,
    Header,
    HTTPException,
    Query,
    Request,
    Response,
    Security,
    WebSocket,
)
from fastapi.responses import HTMLResponse, PlainTextResponse, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader, HTTPBearer, SecurityScopes
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.routing import BaseRoute, Match, Mount, Route
from starlette.types import Scope

from app.web.directory import use_directory
from app.web.quick_route import QuickRoute

#: The functions that were called for a request, in their order.
calls: ContextVar[list[str]] = ContextVar("calls")


def reject_no(value: str) -> str:
    """Validate a text."""
    if value == "no":
        msg = "must not be no"
        raise ValueError(msg)
    return value


class Item(BaseModel):
    """A model with an alias and a default."""

    number: int
    text: str | None = Field(default=None, serialization_alias="theText")


class PickyItem(BaseModel):
    """A model with types that coerce little, and a validator."""

    model_config = ConfigDict(extra="forbid", strict=True)

    number: int
    ratio: float = 1.0
    text: Annotated[str, AfterValidator(reject_no), Field(max_length=9)] = ""


class Filter(BaseModel):
    """Parameters of a query as one model."""

    size: int = 3
    tags: list[str] = []


class OwnError(Exception):
    """An error with a handler of its own."""


class TranslatedError(Exception):
    """An error whose handler raises another one."""


# Dependencies


def called(name: str) -> None:
    calls.get().append(name)


async def by_request(request: Request) -> str:
    """A dependency that takes the request alone."""
    called("by_request")
    return request.url.path


async def authenticate(request: Request) -> str:
    """A dependency that rejects."""
    called("authenticate")
    if "x-key" not in request.headers:
        raise HTTPException(401, "no key", {"WWW-Authenticate": "Key"})
    return request.headers["x-key"]


async def nested(path: Annotated[str, Depends(by_request)], size: int = 1) -> str:
    """A dependency of a dependency, with a parameter of its own."""
    called("nested")
    return path * size


async def nested_authentication(key: Annotated[str, Depends(authenticate)]) -> str:
    """A dependency that rejects by another."""
    called("nested_authentication")
    return key


async def with_body(item: Item) -> Item:
    """A dependency with a body."""
    called("with_body")
    return item


async def never_cached(path: Annotated[str, Depends(by_request, use_cache=False)]) -> str:
    """A dependency whose own one is called again."""
    called("never_cached")
    return path


async def opened() -> AsyncIterator[str]:
    """A dependency with `yield`."""
    called("opened")
    try:
        yield "opened"
    finally:
        called("closed")


def opened_in_thread() -> Iterator[str]:
    """A dependency with `yield` that is not async."""
    yield "opened in a thread"


def in_thread() -> str:
    """A dependency that is not async."""
    return "in a thread"


async def scoped(scopes: SecurityScopes) -> list[str]:
    """A dependency that asks for the scopes."""
    called("scoped")
    return scopes.scopes


async def set_header(response: Response) -> None:
    """A dependency that adds to the response."""
    response.headers["X-Set"] = "by dependency"
    response.status_code = 299


async def limited(path: Annotated[int, Depends(lambda: 1)]) -> int:
    """A dependency of a lambda, which is not async."""
    return path


class MethodOf:
    """A dependency that is an object."""

    async def __call__(self, request: Request) -> str:
        called("object")
        return request.method


def decorated(function: Any) -> Any:
    """A decorator with an async wrapper."""

    @wraps(function)
    async def wrapper(*args: Any, **options: Any) -> Any:
        called("wrapper")
        return await function(*args, **options)

    return wrapper


@decorated
async def in_wrapper(number: int) -> int:
    """A decorated dependency."""
    return number


class PickyRoute(APIRoute):
    """A route that matches by a header."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match only with a key."""
        if (b"x-key", b"k") not in scope["headers"]:
            return Match.NONE, {}
        return super().matches(scope)


class OddRoute(BaseRoute):
    """A route that is neither of FastAPI nor of Starlette."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match one path."""
        return (Match.FULL if scope["path"] == "/odd" else Match.NONE), {}

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        """Respond."""
        await PlainTextResponse("odd")(scope, receive, send)


async def plain(request: Request) -> Response:
    """Return the path's parameters: a function for Starlette's `Route`."""
    return PlainTextResponse(repr(request.path_params))


def create(*, is_quick: bool, dependencies: list[Any] | None = None) -> FastAPI:
    """Return the application."""
    route_class = QuickRoute if is_quick else APIRoute
    app = FastAPI(dependencies=dependencies)
    app.router.route_class = route_class
    if is_quick:
        use_directory(app)
    _add_responses(app)
    _add_parameters(app)
    _add_bodies(app)
    _add_dependencies(app)
    _add_others(app)
    _include_routers(app, route_class)

    @app.exception_handler(OwnError)
    async def respond(_: Request, error: OwnError) -> Response:
        return PlainTextResponse(repr(error), 420)

    @app.exception_handler(TranslatedError)
    async def translate(_: Request, error: TranslatedError) -> Response:
        raise HTTPException(409, str(error)) from error

    return app


def _add_responses(app: FastAPI) -> None:
    @app.get("/")
    async def root() -> dict[str, str]:
        return {"a": "b"}

    @app.get("/model/{number}")
    async def model(number: int) -> Item:
        return Item(number=number)

    @app.get("/filtered/{number}")
    async def filtered(number: int) -> Item:
        return {"number": number, "secret": 1}  # type: ignore[return-value]

    @app.get("/invalid-result")
    async def invalid_result() -> Item:
        return {"number": "no"}  # type: ignore[return-value]

    @app.get("/untyped")
    async def untyped():  # type: ignore[no-untyped-def]
        return {"uuid": UUID(int=1), "set": {1}, "item": Item(number=1)}

    @app.get("/nothing")
    async def nothing() -> None:
        pass

    @app.get("/infinite")
    async def infinite() -> float:
        return float("inf")

    @app.get("/response")
    async def response() -> Response:
        return PlainTextResponse("hi", 202, {"X-A": "b"})

    @app.get("/response-of-model", response_model=Item)
    async def response_of_model() -> Response:
        return HTMLResponse("<p>")

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        return StreamingResponse(iter(["a", "b"]))

    @app.get("/lines")
    async def lines() -> AsyncIterator[Item]:
        yield Item(number=1)

    @app.get("/status", status_code=203)
    async def status() -> int:
        return 5

    @app.get("/empty", status_code=204)
    async def empty() -> None:
        pass

    @app.get("/not-modified", status_code=304)
    async def not_modified() -> Response:
        return Response(status_code=304)

    @app.get("/text", response_class=PlainTextResponse)
    async def text() -> str:
        return "text"

    @app.get("/without-none", response_model=Item, response_model_exclude_none=True)
    async def without_none() -> Any:
        return Item(number=1)

    @app.get("/included", response_model=Item, response_model_include={"text"})
    async def included() -> Any:
        return Item(number=1)

    @app.get("/by-name", response_model=Item, response_model_by_alias=False)
    async def by_name() -> Any:
        return Item(number=1)

    @app.get("/http-error")
    async def http_error() -> None:
        raise HTTPException(418, {"a": 1}, {"X-A": "b"})

    @app.get("/own-error")
    async def own_error() -> None:
        raise OwnError("a")

    @app.get("/translated-error")
    async def translated_error() -> None:
        raise TranslatedError("a")

    @app.get("/translated-error/{number}", dependencies=[Depends(opened)])
    async def translated_error_of_usual_route(number: int) -> None:
        raise TranslatedError(number)

    @app.get("/bug")
    async def bug() -> None:
        raise ZeroDivisionError

    @app.get("/background")
    async def background(tasks: BackgroundTasks) -> int:
        tasks.add_task(called, "task")
        return 1

    @app.get("/set-header")
    async def set_headers(response: Response) -> int:
        response.headers["X-Set"] = "1"
        response.set_cookie("a", "b")
        return 1


def _add_parameters(app: FastAPI) -> None:
    @app.get("/query")
    async def query(
        size: Annotated[int, Query(ge=1)] = 3, tag: Annotated[list[str] | None, Query()] = None
    ) -> Any:
        return [size, tag]

    @app.get("/query-model")
    async def query_model(wanted: Annotated[Filter, Query()]) -> Filter:
        return wanted

    @app.get("/header")
    async def header(x_key: Annotated[str, Header()], agent: str = Header("none")) -> Any:
        return [x_key, agent]

    @app.get("/cookie")
    async def cookie(session: Annotated[str | None, Cookie()] = None) -> str | None:
        return session

    @app.get("/uuid/{id}/deep/{number}")
    async def uuid(id: UUID, number: int, request: Request) -> Any:  # noqa: A002
        return [id, number, request.path_params, request.scope["route"].path]

    @app.get("/file/{path:path}")
    async def file(path: str) -> str:
        return path

    @app.get("/converted/{number:int}")
    async def converted(number: int) -> int:
        return number

    @app.post("/raw")
    async def raw(request: Request) -> int:
        return len(await request.body())

    @app.api_route("/many", methods=["GET", "POST", "DELETE"])
    async def many(request: Request) -> str:
        return request.method

    @app.get("/many/{name}")
    async def one(name: str) -> str:
        return name

    @app.put("/many/fixed")
    async def fixed() -> str:
        return "fixed"


def _add_bodies(app: FastAPI) -> None:
    @app.post("/body")
    async def body(item: Item, key: Annotated[str, Depends(authenticate)]) -> Item:
        called(key)
        return item

    @app.put("/embedded/{number}")
    async def embedded(number: int, item: Annotated[Item, Body(embed=True)]) -> Any:
        return [number, item]

    @app.post("/picky-body")
    async def picky_body(item: PickyItem, request: Request) -> Any:
        return [item, await request.json(), await request.body()]

    @app.post("/list-body")
    async def list_body(numbers: list[int]) -> Any:
        return numbers

    @app.post("/default-body")
    async def default_body(item: Item | None = None) -> Any:
        return item

    @app.post("/any-body")
    async def any_body(value: Annotated[Any, Body()]) -> Any:
        return repr(value)

    @app.post("/bytes-body")
    async def bytes_body(value: Annotated[bytes, Body()]) -> Any:
        return len(value)

    @app.post("/two-bodies")
    async def two_bodies(item: Item, other: Annotated[int, Body()]) -> Any:
        return [item, other]

    @app.post("/body-of-dependency/{number}")
    async def body_of_dependency(number: int, key: Annotated[Any, Depends(with_body)]) -> Any:
        return [number, key]

    @app.post("/body-of-both")
    async def body_of_both(item: Item, same: Annotated[Any, Depends(with_body)]) -> Any:
        return [item, same, item is same]

    @app.post("/other-body-of-dependency")
    async def other_body(value: Item, other: Annotated[Any, Depends(with_body)]) -> Any:
        return [value, other]

    @app.post("/late-body", dependencies=[Depends(authenticate)])
    async def late_body(item: Item, size: int, tasks: BackgroundTasks) -> Any:
        tasks.add_task(called, "task")
        return [item, size]


def _add_dependencies(app: FastAPI) -> None:
    @app.get("/by-request/{number}")
    async def simple(number: int, path: Annotated[str, Depends(by_request)]) -> Item:
        return Item(number=number, text=path)

    @app.get("/nested/{number}")
    async def deep(number: int, path: Annotated[str, Depends(nested)]) -> Any:
        return [number, path]

    @app.get("/authenticated/{number}")
    async def authenticated(number: int, key: Annotated[str, Depends(authenticate)]) -> Any:
        return [number, key]

    @app.get("/nested-authenticated", dependencies=[Depends(nested_authentication)])
    async def nested_authenticated() -> str:
        return "in"

    @app.get("/twice")
    async def twice(
        a: Annotated[str, Depends(nested)],
        b: Annotated[str, Depends(by_request)],
        c: Annotated[str, Depends(never_cached)],
        d: Annotated[str, Depends(by_request, use_cache=False)],
        e: Annotated[str, Depends(by_request, scope="function")],
    ) -> Any:
        return [a, b, c, d, e]

    @app.get("/yield/{number}")
    async def with_yield(number: int, value: Annotated[str, Depends(opened)]) -> Any:
        called("endpoint")
        return [number, value]

    @app.get("/yield-in-thread")
    async def with_thread(value: Annotated[str, Depends(opened_in_thread)]) -> str:
        return value

    @app.get("/yield-error")
    async def yield_error(_: Annotated[str, Depends(opened)]) -> None:
        raise HTTPException(409, "no")

    @app.get("/in-thread")
    def endpoint_in_thread(value: Annotated[str, Depends(in_thread)]) -> str:
        return value

    @app.get("/dependency-in-thread")
    async def dependency_in_thread(value: Annotated[str, Depends(in_thread)]) -> str:
        return value

    @app.get("/lambda")
    async def of_lambda(value: Annotated[int, Depends(limited)]) -> int:
        return value

    @app.get("/object")
    async def of_object(value: Annotated[str, Depends(MethodOf())]) -> str:
        return value

    @app.get("/class")
    async def of_class(value: Annotated[Filter, Depends(Filter)]) -> Filter:
        return value

    @app.get("/partial")
    async def of_partial(value: Annotated[str, Depends(partial(nested, size=2))]) -> str:
        return value

    @app.get("/decorated/{number}")
    @decorated
    async def of_wrapper(number: int, same: Annotated[int, Depends(in_wrapper)]) -> Any:
        return [number, same]

    @app.get("/bearer")
    async def bearer(token: Annotated[Any, Depends(HTTPBearer())]) -> Any:
        return token

    @app.get("/key")
    async def key(value: Annotated[str, Security(APIKeyHeader(name="x-key"))]) -> str:
        return value

    @app.get("/scopes")
    async def scopes(value: Annotated[Any, Security(scoped, scopes=["a", "b"])]) -> Any:
        return value

    @app.get("/no-scopes")
    async def no_scopes(value: Annotated[str, Security(authenticate)]) -> str:
        return value

    @app.get("/header-of-dependency", dependencies=[Depends(set_header)])
    async def header_of_dependency() -> int:
        return 1


def _add_others(app: FastAPI) -> None:
    app.add_route("/starlette/{name}", plain, methods=["GET", "DELETE"])
    app.router.add_api_route("/picky", _picky, route_class_override=PickyRoute)
    app.router.add_api_route("/{first}/picky", _picky_by_parameter)
    app.router.routes.append(OddRoute())
    mounted = FastAPI()

    @mounted.get("/in/{name}")
    async def inside(name: str) -> str:
        return name

    app.mount("/mounted", mounted)
    app.mount("/tenants/{tenant}", mounted)
    app.router.routes.append(Mount("/listed", routes=[Route("/{name}", plain)]))
    app.host("other.example", mounted)

    @app.get("/mounted/late")
    async def shadowed() -> str:
        return "shadowed by the mount"

    @app.websocket("/socket")
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    @app.post("/socket")
    async def beside_socket() -> str:
        return "not a socket"


async def _picky() -> str:
    return "picky"


async def _picky_by_parameter(first: str) -> str:
    return first


def _include_routers(app: FastAPI, route_class: type[APIRoute]) -> None:
    outer = APIRouter(route_class=route_class, dependencies=[Depends(authenticate)])
    inner = APIRouter(prefix="/inner", route_class=route_class)
    deepest = APIRouter(route_class=route_class, dependencies=[Depends(by_request)])

    @inner.get("/{number}")
    async def number_of(number: int) -> Item:
        return Item(number=number)

    @inner.get("/fixed/path")
    async def fixed() -> str:
        return "fixed"

    @inner.post("/{number}")
    async def post(number: int, item: Item) -> Any:
        return [number, item]

    @deepest.get("")
    async def own_path() -> str:
        return "own path"

    @deepest.get("/slash/")
    async def slash() -> str:
        return "slash"

    @deepest.get("/{name}/deep", status_code=202)
    async def deep(name: str, request: Request) -> Any:
        return [name, request.path_params]

    inner.mount("/files", FastAPI())
    inner.add_route("/plain/{name}", plain)
    inner.include_router(deepest, prefix="/deepest")
    outer.include_router(inner, prefix="/outer")
    app.include_router(outer, prefix="/v1")
    app.include_router(inner, prefix="/open", default_response_class=PlainTextResponse)
    app.include_router(inner, prefix="/{tenant}", dependencies=[Depends(nested)])
    app.include_router(inner)


BODY_PATHS = [
    *("/picky-body", "/list-body", "/default-body", "/any-body", "/bytes-body", "/two-bodies"),
    *("/body-of-dependency/1", "/body-of-dependency/x", "/body-of-both"),
    *("/other-body-of-dependency", "/late-body?size=1", "/late-body"),
]
#: One request at least for each route, and some that no route matches.
PATHS = [
    *("/", "", "//", "/nope", "/model", "/model/", "/model/5", "/model/x", "/model/5/"),
    *("/model/5%0A", "/filtered/3", "/invalid-result", "/untyped", "/nothing", "/infinite"),
    *("/response", "/response-of-model", "/stream", "/lines", "/status", "/empty"),
    *("/not-modified", "/text", "/without-none", "/included", "/by-name", "/http-error"),
    *("/own-error", "/translated-error", "/translated-error/1", "/translated-error/x"),
    *("/bug", "/background", "/set-header", "/query", "/query?size=4"),
    *("/query?size=0&tag=a&tag=b", "/query?size=x", "/query-model?size=9&tags=a"),
    *("/query-model?size=x", "/header", "/cookie"),
    *("/uuid/00000000-0000-0000-0000-000000000001/deep/2", "/uuid/x/deep/y", "/file/a/b/c"),
    *("/file/", "/converted/5", "/converted/x", "/body", "/embedded/1", "/embedded/x", "/raw"),
    *BODY_PATHS,
    *("/many", "/many/a", "/many/fixed", "/by-request/1", "/by-request/x", "/nested/1?size=2"),
    *("/nested/1?size=x", "/nested/x?size=x", "/authenticated/1", "/authenticated/x"),
    *("/nested-authenticated", "/twice", "/twice?size=x", "/yield/1", "/yield/x"),
    *("/yield-in-thread", "/yield-error", "/in-thread", "/dependency-in-thread", "/lambda"),
    *("/object", "/class?size=8", "/partial", "/decorated/4", "/decorated/x", "/bearer", "/key"),
    *("/scopes", "/no-scopes", "/header-of-dependency", "/starlette/a", "/picky", "/a/picky"),
    *("/odd", "/mounted/in/a", "/mounted/late", "/mounted", "/mounted/nope", "/tenants/a/in/b"),
    *("/listed/a", "/socket", "/v1/outer/inner/5", "/v1/outer/inner/x"),
    *("/v1/outer/inner/fixed/path", "/v1/outer/inner/deepest", "/v1/outer/inner/deepest/"),
    *("/v1/outer/inner/deepest/slash", "/v1/outer/inner/deepest/slash/"),
    *("/v1/outer/inner/deepest/a/deep", "/v1/outer/inner", "/v1/outer/inner/plain/a"),
    *("/v1/outer/inner/files/a", "/open/inner/5", "/open/inner/x", "/open/inner/deepest/a/deep"),
    *("/any/inner/5", "/any/inner/x?size=x", "/inner/5", "/inner/deepest/a/deep"),
    *("/inner/fixed/path", "/inner/fixed/path%0A", "/openapi.json", "/docs"),
]
