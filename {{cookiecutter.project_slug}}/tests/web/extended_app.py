"""The service as a team extends it: middleware, error handlers, mounted applications."""

import asyncio
from pathlib import Path

from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from starlette.middleware.base import RequestResponseEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Mount, Route

from app.main import create_app
from app.settings import load_settings

app = create_app(load_settings())
app.add_middleware(GZipMiddleware, minimum_size=1)


@app.middleware("http")
async def reject_or_pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """Respond without the application, or add a header."""
    if request.url.path == "/rejected-by-team":
        return PlainTextResponse("rejected", 418)
    if request.url.path == "/failed-by-team":
        raise RuntimeError
    response = await call_next(request)
    response.headers["X-Team"] = "a"
    return response


@app.get("/bug")
async def bug() -> None:
    """Raise."""
    raise RuntimeError


@app.get("/exit")
async def exit_service() -> None:
    """Exit, inside of the task that `@app.middleware("http")` starts."""
    raise SystemExit


@app.get("/slow")
async def slow(seconds: float) -> None:
    """Respond late."""
    await asyncio.sleep(seconds)


@app.put("/read-only")
async def read_only() -> None:
    """Reject the method oneself."""
    raise HTTPException(405, "Frozen until May.", {"allow": "GET", "Retry-After": "9"})


@app.post("/undecided")
async def undecided() -> None:
    """Reject the method without naming others."""
    raise HTTPException(405)


@app.get("/undecided")
async def undecided_get() -> None:
    """Accept another method."""


@app.get("/detail")
async def detail(kind: str) -> None:
    """Raise an error whose detail is not text."""
    details = {
        "dict": {"code": "E7", "fields": ["a", 1, None], 5: {"b": True}},
        "list": ["a", {"b": 1.5}],
        "number": 7,
        "path": {"directory": Path("/a")},
        "error": ValueError("no such fruit"),
        "none": None,
    }
    raise HTTPException(409, details[kind])


async def plain(request: Request) -> Response:
    """Respond with what is in the path."""
    return JSONResponse(request.path_params)


def create_mounted() -> FastAPI:
    """Return an application with routes of its own, such as `/health/live`."""
    mounted = FastAPI()
    router = APIRouter(prefix="/boxes")

    @mounted.get("/health/live")
    async def live() -> None: ...

    @mounted.get("/items/{item}")
    async def item(item: str) -> str:
        return item

    @router.get("/{box}")
    async def box(box: str) -> str:
        return box

    mounted.include_router(router)
    mounted.mount("/static", StaticFiles(directory=Path(__file__).parent))
    return mounted


inner = APIRouter()
inner.mount("/mounted", create_mounted())
inner.add_route("/plain/{name}", plain)
app.include_router(inner, prefix="/outer/inner")
app.mount("/tenants/{tenant}", create_mounted())
app.mount("/zipped", GZipMiddleware(create_mounted()))
app.mount("/static", StaticFiles(directory=Path(__file__).parent))
deep = [Mount("/{b}", routes=[Route("/plain/{name}", plain, methods=["POST"])])]
app.router.routes.append(Mount("/a", routes=deep))
app.host("other.example", create_mounted())


@app.exception_handler(Exception)
async def respond_to_bug(request: Request, error: Exception) -> Response:
    """Respond to a bug in the team's own way."""
    return JSONResponse({"team": type(error).__name__}, 500)
