"""What every route shares: request IDs, problems, metrics, docs, CORS; the app in-process."""

import json
import logging
from collections.abc import AsyncIterator
from typing import Annotated, Literal

import httpx
import pytest
from fastapi import APIRouter, Body, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from prometheus_client import REGISTRY
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from app.errors import ServiceError
from app.main import create_app
from app.settings import Settings
from app.storage.redis import RedisDependency
from app.web.middleware import RequestMiddleware
from scripts.dev_services import free_port
from tests.conftest import InProcess

CARD = "4111111111111111"


class Cash(BaseModel):
    kind: Literal["cash"]


class Card(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["card"]
    number: Annotated[int, Field(lt=10)]


Settled = Annotated[Cash | Card, Body(discriminator="kind")]


def with_routes(settings: Settings) -> FastAPI:
    """The app with routes that go wrong."""
    app, router = create_app(settings), APIRouter(prefix="/inner")

    @app.get("/bug")
    async def bug() -> None:
        raise RuntimeError(CARD)

    @app.get("/late-bug")
    async def late_bug() -> Response:
        async def parts() -> AsyncIterator[bytes]:
            yield b"half"
            raise RuntimeError(CARD)

        return StreamingResponse(parts())

    @app.get("/left")
    async def left() -> None:
        raise ClientDisconnect

    @app.get("/teapot")
    async def teapot() -> None:
        raise HTTPException(418, "I'm a teapot", {"X-Tea": "green"})

    @app.get("/odd")
    async def odd() -> None:
        raise HTTPException(599, "odd")

    @app.get("/unchanged")
    async def unchanged() -> None:
        raise HTTPException(304)

    @app.get("/refused")
    async def refused() -> None:
        raise ServiceError("told to the client")

    @app.post("/settle")
    async def settle(body: Settled, limit: int) -> None: ...

    @app.post("/prices")
    async def prices(body: dict[str, int]) -> None: ...

    @app.get("/cached")
    async def cached(redis: RedisDependency) -> bool:
        await redis.ping()
        return True

    @app.get("/state")
    async def state(request: Request) -> list[str]:
        return sorted(request.state._state)

    @router.get("/{name}")
    async def inner(name: str) -> str:
        return name

    app.include_router(router, prefix="/outer")
    return app


@pytest.fixture
async def http(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    async with InProcess(with_routes(settings)) as client:
        yield client


async def test_the_root_says_who_answers(client: httpx.AsyncClient) -> None:
    assert (await client.get("/")).json() == {
        "service": Settings().service_name,
        "version": "0.0.0",
    }


@pytest.mark.parametrize("given", ["a", "0-9._:/+=-Z", "x" * 128])
async def test_a_good_request_id_is_kept(client: httpx.AsyncClient, given: str) -> None:
    assert (await client.get("/", headers={"X-Request-ID": given})).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", 'a"b', "x" * 129, "x" * 8000, "é", "a\tb"])
async def test_a_forged_request_id_is_replaced(
    client: httpx.AsyncClient, capfd: pytest.CaptureFixture[str], given: str
) -> None:
    answer = await client.get("/nowhere", headers={b"X-Request-ID": given.encode()})
    made = answer.headers["x-request-id"]
    assert made != given
    assert len(made) == 32
    assert answer.json()["request_id"] == made
    output = capfd.readouterr().out
    assert made in output
    assert not given or f'"{given}"' not in output


async def test_the_trace_of_the_caller_is_in_the_line(
    client: httpx.AsyncClient, capfd: pytest.CaptureFixture[str]
) -> None:
    trace, span = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    for header in (
        f"00-{trace}-{span}-01",
        f"00-{trace}-{span}-01-x",
        f"00-{'0' * 32}-{span}-01",
        f"ff-{trace}-{span}-01",
        "junk",
    ):
        await client.get("/", headers={"traceparent": header})
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    traces = [(line.get("trace_id"), line.get("parent_span_id")) for line in lines]
    assert traces == [(trace, span)] + [(None, None)] * 4


async def test_an_access_line_says_what_happened(
    client: httpx.AsyncClient, capfd: pytest.CaptureFixture[str]
) -> None:
    await client.get("/nowhere?card=" + CARD, headers={"X-Request-ID": "abc"})
    output = capfd.readouterr().out
    assert CARD not in output
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
async def test_a_successful_probe_writes_no_line(
    client: httpx.AsyncClient, capfd: pytest.CaptureFixture[str], path: str
) -> None:
    await client.get(path)
    assert capfd.readouterr().out == ""


async def test_log_level_warning_silences_access_lines(
    settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    access = logging.getLogger("access")
    access.setLevel(logging.WARNING)
    async with InProcess(create_app(settings)) as client:
        await client.get("/")
    access.setLevel(logging.NOTSET)
    assert capfd.readouterr().out == ""


async def test_on_a_terminal_an_access_line_is_short(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "access")
    async with InProcess(
        create_app(settings.model_copy(update={"log_format": "console"}))
    ) as client:
        await client.get("/a%0Ab")
    assert caplog.messages[0].startswith("GET '/a\\nb' 404 ")


@pytest.mark.parametrize(
    ("method", "path", "status", "members"),
    [
        ("GET", "/nowhere", 404, {"title": "Not Found"}),
        ("DELETE", "/", 405, {"title": "Method Not Allowed"}),
        ("GET", "/teapot", 418, {"title": "I'm a Teapot", "detail": "I'm a teapot"}),
        ("GET", "/odd", 599, {"title": "Error", "detail": "odd"}),
        (
            "GET",
            "/refused",
            500,
            {"title": "Internal Server Error", "detail": "told to the client"},
        ),
        ("GET", "/bug", 500, {"title": "Internal Server Error"}),
    ],
)
async def test_every_error_is_a_problem(
    http: httpx.AsyncClient, method: str, path: str, status: int, members: dict[str, str]
) -> None:
    answer = await http.request(method, path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    request_id = answer.headers["x-request-id"]
    assert answer.json() == {
        "type": "about:blank",
        "status": status,
        "request_id": request_id,
        **members,
    }


async def test_headers_of_an_error_are_kept(http: httpx.AsyncClient) -> None:
    assert (await http.get("/teapot")).headers["x-tea"] == "green"
    assert (await http.delete("/")).headers["allow"] == "GET"


async def test_a_304_has_no_body(http: httpx.AsyncClient) -> None:
    answer = await http.get("/unchanged")
    assert (answer.status_code, answer.content) == (304, b"")


async def test_a_bug_is_one_line_with_its_traceback_and_tells_the_client_nothing(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await http.get("/bug")
    assert CARD not in answer.text
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.message == "unhandled exception"
    assert record.exc_info


async def test_a_bug_after_the_first_byte_ends_the_answer(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(AssertionError):  # httpx misses the end of the answer
        await http.get("/late-bug")
    assert "unhandled exception" in caplog.messages


async def test_a_client_that_left_is_counted_as_499(
    http: httpx.AsyncClient, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError):  # httpx misses the answer that nobody waits for
        await http.get("/left")
    assert json.loads(capfd.readouterr().out)["status"] == 499


@pytest.mark.parametrize(
    ("body", "faults"),
    [
        ({"kind": "card", "number": int(CARD)}, [("Input should be less than 10", "#/number")]),
        ({"kind": CARD}, [("Input does not match any of the expected kinds", "#")]),
        (
            {"kind": "card", "number": CARD + "x"},
            [("Input should be a valid integer, unable to parse string as an integer", "#/number")],
        ),
        ({"kind": "card", "number": 1, CARD: 1}, [("Extra inputs are not permitted", "#")]),
    ],
)
async def test_a_422_says_what_is_wrong_and_never_what_was_sent(
    http: httpx.AsyncClient,
    capfd: pytest.CaptureFixture[str],
    body: object,
    faults: list[tuple[str, str]],
) -> None:
    answer = await http.post("/settle?limit=1", json=body)
    assert answer.status_code == 422
    found = [
        (fault["detail"], fault["pointer"].replace("/card", ""))
        for fault in answer.json()["errors"]
    ]
    assert found == faults
    assert CARD not in answer.text + capfd.readouterr().out


async def test_a_key_of_the_client_does_not_come_back(http: httpx.AsyncClient) -> None:
    answer = await http.post("/prices", json={CARD: "x", "apples": "y"})
    assert [fault["pointer"] for fault in answer.json()["errors"]] == ["#/*", "#/apples"]
    assert CARD not in answer.text


async def test_a_request_that_needs_a_redis_that_is_away_is_503(settings: Settings) -> None:
    nowhere = settings.model_copy(
        update={"redis_url": SecretStr(f"redis://127.0.0.1:{free_port()}")}
    )
    async with InProcess(with_routes(nowhere)) as client:
        answer = await client.get("/cached")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


async def test_a_422_names_a_wrong_parameter_and_broken_json(http: httpx.AsyncClient) -> None:
    answer = await http.post(f"/settle?limit={CARD}x", content=b'{"kind": ' + CARD.encode())
    assert CARD not in answer.text
    pointers = sorted(fault["pointer"] for fault in answer.json()["errors"])
    assert pointers == ["#", "query/limit"]


async def test_docs_are_served_only_when_enabled(settings: Settings) -> None:
    for enabled, status in ((True, 200), (False, 404)):
        async with InProcess(
            create_app(settings.model_copy(update={"docs_enabled": enabled}))
        ) as client:
            for path in ("/docs", "/redoc", "/openapi.json"):
                assert (await client.get(path)).status_code == status


async def test_cors_is_off_until_origins_are_named(settings: Settings) -> None:
    headers = {"Origin": "https://a.example"}
    for origins, allowed in (((), None), (("https://a.example",), "https://a.example")):
        async with InProcess(
            create_app(settings.model_copy(update={"cors_allow_origins": origins}))
        ) as client:
            answer = await client.get("/", headers=headers)
            assert answer.headers.get("access-control-allow-origin") == allowed


async def test_routes_are_counted_by_their_template_and_strangers_together(
    settings: Settings,
) -> None:
    app = with_routes(settings)
    async with InProcess(app) as client:
        for method, path in (
            ("GET", "/outer/inner/a"),
            ("GET", "/outer/inner/b"),
            ("GET", "/x"),
            ("HACK", "/y"),
        ):
            await client.request(method, path)
    layer = app.middleware_stack
    while not isinstance(layer, RequestMiddleware):
        layer = layer.app  # type: ignore[union-attr]
    assert set(layer.metrics.counts) == {
        ("GET", "/outer/inner/{name}", 200),
        ("GET", "unmatched", 404),
        ("_OTHER", "unmatched", 404),
    }


async def test_nothing_is_registered_globally(settings: Settings) -> None:
    before = set(REGISTRY._names_to_collectors)
    async with InProcess(create_app(settings)) as client:
        await client.get("/")
    assert set(REGISTRY._names_to_collectors) == before
