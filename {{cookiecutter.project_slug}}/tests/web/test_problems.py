"""Error responses: each is a problem document, and none repeats the input."""

import logging
from collections.abc import AsyncIterator
from typing import Annotated, Literal

import httpx
import pytest
from fastapi import Body, FastAPI, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from starlette.exceptions import HTTPException

from app.errors import ServiceError
from app.main import create_app
from app.settings import Settings
from app.storage.redis import RedisDependency
from scripts.dev_services import free_port
from tests.conftest import InProcess

#: Stands for any text that no response and no log line may contain.
CARD_NUMBER = "4111111111111111"


class Cash(BaseModel):
    kind: Literal["cash"]


class Card(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["card"]
    number: Annotated[int, Field(lt=10)]


Tender = Annotated[Cash | Card, Body(discriminator="kind")]


def with_routes(settings: Settings) -> FastAPI:
    """Return the application with routes that fail."""
    app = create_app(settings)

    @app.get("/bug")
    async def bug() -> None:
        raise RuntimeError(CARD_NUMBER)

    @app.get("/late-bug")
    async def late_bug() -> Response:
        async def parts() -> AsyncIterator[bytes]:
            yield b"half"
            raise RuntimeError(CARD_NUMBER)

        return StreamingResponse(parts())

    @app.get("/teapot")
    async def teapot() -> None:
        raise HTTPException(418, "I'm a teapot", {"X-Tea": "green"})

    @app.get("/unknown-status")
    async def unknown_status() -> None:
        raise HTTPException(599, "odd")

    @app.get("/not-modified")
    async def not_modified() -> None:
        raise HTTPException(304)

    @app.get("/service-error")
    async def service_error() -> None:
        raise ServiceError("public detail")

    @app.post("/pay")
    async def pay(body: Tender, limit: int) -> None: ...

    @app.post("/prices")
    async def prices(body: dict[str, int]) -> None: ...

    @app.get("/ping-redis")
    async def ping_redis(redis: RedisDependency) -> bool:
        await redis.ping()
        return True

    return app


@pytest.fixture
async def http(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    async with InProcess(with_routes(settings)) as client:
        yield client


@pytest.mark.parametrize(
    ("method", "path", "status", "members"),
    [
        ("GET", "/nowhere", 404, {"title": "Not Found"}),
        ("DELETE", "/", 405, {"title": "Method Not Allowed"}),
        ("GET", "/teapot", 418, {"title": "I'm a Teapot", "detail": "I'm a teapot"}),
        ("GET", "/unknown-status", 599, {"title": "Error", "detail": "odd"}),
        (
            "GET",
            "/service-error",
            500,
            {"title": "Internal Server Error", "detail": "public detail"},
        ),
        ("GET", "/bug", 500, {"title": "Internal Server Error"}),
    ],
)
async def test_every_error_is_a_problem(
    http: httpx.AsyncClient, method: str, path: str, status: int, members: dict[str, str]
) -> None:
    response = await http.request(method, path)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["cache-control"] == "no-store"
    assert response.json() == {
        "type": "about:blank",
        "status": status,
        "request_id": response.headers["x-request-id"],
        **members,
    }


async def test_headers_of_an_error_are_sent(http: httpx.AsyncClient) -> None:
    teapot = await http.get("/teapot")
    assert teapot.headers["x-tea"] == "green"
    not_allowed = await http.delete("/")
    assert not_allowed.headers["allow"] == "GET, HEAD"


async def test_304_has_no_body(http: httpx.AsyncClient) -> None:
    response = await http.get("/not-modified")
    assert response.status_code == 304
    assert response.content == b""


async def test_bug_is_logged_once_and_hidden_from_the_client(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    response = await http.get("/bug")
    assert CARD_NUMBER not in response.text
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.message == "unhandled exception"
    assert record.exc_info


async def test_bug_after_the_first_byte_ends_the_response(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    """httpx fails an assertion of its own for a response that does not end."""
    with pytest.raises(AssertionError):
        await http.get("/late-bug")
    assert "unhandled exception" in caplog.messages


async def test_unavailable_redis_is_503(settings: Settings) -> None:
    url = SecretStr(f"redis://127.0.0.1:{free_port()}")
    unreachable = settings.model_copy(update={"redis_url": url})
    async with InProcess(with_routes(unreachable)) as client:
        response = await client.get("/ping-redis")
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            {"kind": "card", "number": int(CARD_NUMBER)},
            [("Input should be less than 10", "#/number")],
        ),
        ({"kind": CARD_NUMBER}, [("Input does not match any of the expected kinds", "#")]),
        (
            {"kind": "card", "number": CARD_NUMBER + "x"},
            [("Input should be a valid integer, unable to parse string as an integer", "#/number")],
        ),
        ({"kind": "card", "number": 1, CARD_NUMBER: 1}, [("Extra inputs are not permitted", "#")]),
    ],
)
async def test_422_describes_the_error_without_the_input(
    http: httpx.AsyncClient,
    capfd: pytest.CaptureFixture[str],
    body: object,
    expected: list[tuple[str, str]],
) -> None:
    response = await http.post("/pay?limit=1", json=body)
    assert response.status_code == 422
    errors = response.json()["errors"]
    # The pointer contains the kind too, which is not a part of the body.
    found = [(error["detail"], error["pointer"].replace("/card", "")) for error in errors]
    assert found == expected
    assert CARD_NUMBER not in response.text + capfd.readouterr().out


async def test_422_hides_keys_that_are_not_identifiers(http: httpx.AsyncClient) -> None:
    response = await http.post("/prices", json={CARD_NUMBER: "x", "apples": "y"})
    assert [error["pointer"] for error in response.json()["errors"]] == ["#/*", "#/apples"]
    assert CARD_NUMBER not in response.text


async def test_422_points_to_parameters_and_invalid_json(http: httpx.AsyncClient) -> None:
    content = b'{"kind": ' + CARD_NUMBER.encode()
    response = await http.post(f"/pay?limit={CARD_NUMBER}x", content=content)
    assert CARD_NUMBER not in response.text
    pointers = sorted(error["pointer"] for error in response.json()["errors"])
    assert pointers == ["#", "query/limit"]
