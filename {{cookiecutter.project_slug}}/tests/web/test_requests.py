"""Request IDs, access lines, metrics, documentation and CORS, in this process."""

import json
import logging
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from prometheus_client import REGISTRY
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from app.main import create_app
from app.settings import Settings
from app.web.application import Service
from tests.conftest import InProcess

#: Stands for any text of a query, which no log line may contain.
CARD_NUMBER = "4111111111111111"


def with_routes(settings: Settings) -> Service:
    """Return the application with a nested route, and one whose client disconnects."""
    app = create_app(settings)
    router = APIRouter(prefix="/inner")

    @app.get("/disconnect")
    async def disconnect() -> None:
        raise ClientDisconnect

    @router.get("/{name}")
    async def inner(name: str) -> str:
        return name

    app.include_router(router, prefix="/outer")
    return app


@pytest.fixture
async def http(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    async with InProcess(with_routes(settings)) as client:
        yield client


async def test_root_returns_name_and_version(client: httpx.AsyncClient) -> None:
    response = await client.get("/")
    assert response.json() == {"service": Settings().service_name, "version": "0.0.0"}


# Request IDs and traces


@pytest.mark.parametrize("request_id", ["a", "0-9._:/+=-Z", "x" * 128])
async def test_valid_request_id_is_kept(client: httpx.AsyncClient, request_id: str) -> None:
    response = await client.get("/", headers={"X-Request-ID": request_id})
    assert response.headers["x-request-id"] == request_id


@pytest.mark.parametrize("request_id", ["", "a b", 'a"b', "x" * 129, "x" * 8000, "é", "a\tb"])
async def test_invalid_request_id_is_replaced(
    client: httpx.AsyncClient, capfd: pytest.CaptureFixture[str], request_id: str
) -> None:
    """It could forge log lines."""
    response = await client.get("/nowhere", headers={b"X-Request-ID": request_id.encode()})
    generated = response.headers["x-request-id"]
    assert generated != request_id
    assert len(generated) == 32
    assert response.json()["request_id"] == generated
    output = capfd.readouterr().out
    assert generated in output
    if request_id:
        assert f'"{request_id}"' not in output


async def test_valid_traceparent_is_in_the_access_line(
    client: httpx.AsyncClient, capfd: pytest.CaptureFixture[str]
) -> None:
    """Invalid: a suffix in version 00, a zero trace-id, version ff, other text."""
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    span_id = "00f067aa0ba902b7"
    for traceparent in (
        f"00-{trace_id}-{span_id}-01",
        f"00-{trace_id}-{span_id}-01-x",
        f"00-{'0' * 32}-{span_id}-01",
        f"ff-{trace_id}-{span_id}-01",
        "junk",
    ):
        await client.get("/", headers={"traceparent": traceparent})
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    traces = [(line.get("trace_id"), line.get("parent_span_id")) for line in lines]
    assert traces == [(trace_id, span_id)] + [(None, None)] * 4


# Access lines


async def test_access_line_describes_the_request(
    client: httpx.AsyncClient, capfd: pytest.CaptureFixture[str]
) -> None:
    await client.get("/nowhere?card=" + CARD_NUMBER, headers={"X-Request-ID": "abc"})
    output = capfd.readouterr().out
    assert CARD_NUMBER not in output
    line = json.loads(output)
    assert isinstance(line.pop("timestamp"), str)
    assert isinstance(line.pop("pid"), int)
    assert line.pop("duration_ms") > 0
    assert line.pop("response_bytes") > 0
    assert line == {
        "level": "info",
        "logger": "access",
        "message": "request",
        "service": Settings().service_name,
        "request_id": "abc",
        "method": "GET",
        "path": "/nowhere",
        "route": "unmatched",
        "status": 404,
        "client": "127.0.0.1",
    }


@pytest.mark.parametrize("path", ["/health/live", "/health/startup", "/health/ready"])
async def test_successful_probe_has_no_access_line(
    client: httpx.AsyncClient, capfd: pytest.CaptureFixture[str], path: str
) -> None:
    await client.get(path)
    assert capfd.readouterr().out == ""


async def test_log_level_warning_disables_access_lines(
    settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    access = logging.getLogger("access")
    access.setLevel(logging.WARNING)
    async with InProcess(create_app(settings)) as client:
        await client.get("/")
    access.setLevel(logging.NOTSET)
    assert capfd.readouterr().out == ""


async def test_access_line_is_short_on_a_terminal(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "access")
    console = settings.model_copy(update={"log_format": "console"})
    async with InProcess(create_app(console)) as client:
        await client.get("/a%0Ab")
    assert caplog.messages[0].startswith("GET '/a\\nb' 404 ")


async def test_disconnected_client_is_logged_with_status_499(
    http: httpx.AsyncClient, capfd: pytest.CaptureFixture[str]
) -> None:
    """httpx fails an assertion of its own, since it gets no response."""
    with pytest.raises(AssertionError):
        await http.get("/disconnect")
    assert json.loads(capfd.readouterr().out)["status"] == 499


# Metrics


async def test_metrics_have_route_templates_and_bounded_labels(settings: Settings) -> None:
    """Unknown paths and methods share a label: clients cannot invent time series."""
    app = with_routes(settings)
    async with InProcess(app) as client:
        await client.get("/outer/inner/a")
        await client.get("/outer/inner/b")
        await client.get("/x")
        await client.request("HACK", "/y")
    assert set(app.request_middleware.metrics.counts) == {
        ("GET", "/outer/inner/{name}", 200),
        ("GET", "unmatched", 404),
        ("_OTHER", "unmatched", 404),
    }


async def test_application_registers_no_global_metrics(settings: Settings) -> None:
    """A process may create several applications."""
    before = set(REGISTRY._names_to_collectors)
    async with InProcess(create_app(settings)) as client:
        await client.get("/")
    assert set(REGISTRY._names_to_collectors) == before


# Documentation and CORS


@pytest.mark.parametrize(("enabled", "status"), [(True, 200), (False, 404)])
async def test_docs_are_served_only_when_enabled(
    settings: Settings, enabled: bool, status: int
) -> None:
    changed = settings.model_copy(update={"docs_enabled": enabled})
    async with InProcess(create_app(changed)) as client:
        for path in ("/docs", "/redoc", "/openapi.json"):
            response = await client.get(path)
            assert response.status_code == status


@pytest.mark.parametrize(
    ("origins", "allowed"), [((), None), (("https://a.example",), "https://a.example")]
)
async def test_cors_is_off_by_default(
    settings: Settings, origins: tuple[str, ...], allowed: str | None
) -> None:
    changed = settings.model_copy(update={"cors_allow_origins": origins})
    async with InProcess(create_app(changed)) as client:
        response = await client.get("/", headers={"Origin": "https://a.example"})
        assert response.headers.get("access-control-allow-origin") == allowed


# Agents


@pytest.mark.parametrize("owner", [FastAPI, Starlette])
async def test_call_of_an_agent_sees_every_request(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, owner: type[Starlette]
) -> None:
    """Sentry's integration of Starlette replaces its `__call__`."""
    original = owner.__call__
    seen: list[str] = []

    async def note(self: Starlette, scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["path"])
        await original(self, scope, receive, send)

    monkeypatch.setattr(owner, "__call__", note)
    async with InProcess(create_app(settings)) as client:
        assert (await client.get("/")).status_code == 200
        assert (await client.get("/nope")).status_code == 404
    assert seen == ["/", "/nope"]
