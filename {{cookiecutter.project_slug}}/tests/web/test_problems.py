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

from app.errors import (
    ConflictError,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    PreconditionFailedError,
    ServiceError,
    TooManyRequestsError,
    UnauthorizedError,
    UnavailableError,
)
from app.main import create_app
from app.settings import Settings
from app.storage.redis import RedisDependency
from app.web.problems import MEDIA_TYPE, problem_responses, recent_causes
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


class SeatTakenError(ConflictError):
    """A feature's own error, with a page that describes it."""

    code = "seat_taken"
    type = "https://errors.example/seat-taken"
    title = "Seat taken"


class BadGatewayError(ServiceError):
    status = 502


ERRORS = {
    "unauthorized": UnauthorizedError("Sign in first.", 'Bearer realm="orders"'),
    "forbidden": ForbiddenError("Not yours."),
    "not_found": NotFoundError("There is no such order."),
    "conflict": ConflictError("It is shipped."),
    "precondition_failed": PreconditionFailedError("It has changed."),
    "invalid_request": InvalidRequestError("It ends before it begins."),
    "too_many_requests": TooManyRequestsError("Slow down.", 7),
    "unavailable": UnavailableError("Later.", 3),
    "seat_taken": SeatTakenError("Choose another."),
}
STATUSES = {"unauthorized": 401, "forbidden": 403, "not_found": 404, "conflict": 409}
STATUSES |= {"precondition_failed": 412, "invalid_request": 422, "too_many_requests": 429}
STATUSES |= {"unavailable": 503, "seat_taken": 409}
CAUSED = {
    "bug": ServiceError("public detail"),
    "gateway": BadGatewayError("public detail"),
    "outage": UnavailableError("public detail"),
    "conflict": ConflictError("public detail"),
}


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

    @app.get("/errors/{name}")
    async def raise_error(name: str) -> None:
        raise ERRORS[name]

    @app.get("/caused/{name}")
    async def raise_from(name: str) -> None:
        recent_causes.seen_at.clear()
        try:
            raise LookupError(f"cause of {name}")
        except LookupError as error:
            raise CAUSED[name] from error

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


@pytest.mark.parametrize("code", ERRORS)
async def test_error_has_a_code_for_programs(http: httpx.AsyncClient, code: str) -> None:
    """RFC 9457, sections 3.1.4 and 3.2: `detail` is for people, an extension for programs."""
    response = await http.get(f"/errors/{code}")
    assert response.status_code == STATUSES[code]
    assert response.json()["code"] == code
    assert response.json()["detail"] == ERRORS[code].detail


async def test_headers_that_a_status_requires_are_sent(http: httpx.AsyncClient) -> None:
    """RFC 9110, sections 15.5.2 and 10.2.3, and RFC 6585, section 4."""
    unauthorized = await http.get("/errors/unauthorized")
    assert unauthorized.headers["www-authenticate"] == 'Bearer realm="orders"'
    assert (await http.get("/errors/too_many_requests")).headers["retry-after"] == "7"
    assert (await http.get("/errors/unavailable")).headers["retry-after"] == "3"


async def test_error_of_a_type_has_its_own_title(http: httpx.AsyncClient) -> None:
    """RFC 9457, section 4.2.1: only `about:blank` has the title of the status."""
    problem = (await http.get("/errors/seat_taken")).json()
    assert problem["type"] == "https://errors.example/seat-taken"
    assert problem["title"] == "Seat taken"


@pytest.mark.parametrize(
    ("name", "status", "level", "has_traceback"),
    [
        ("bug", 500, "ERROR", True),
        ("gateway", 502, "WARNING", False),
        ("outage", 503, "WARNING", False),
    ],
)
async def test_cause_of_a_5xx_is_logged_once_and_hidden(
    http: httpx.AsyncClient,
    caplog: pytest.LogCaptureFixture,
    name: str,
    status: int,
    level: str,
    has_traceback: bool,
) -> None:
    """`raise ... from error`: one line with the cause; an outage is not logged each time."""
    response = await http.get(f"/caused/{name}")
    assert (response.status_code, response.json()["detail"]) == (status, "public detail")
    assert "cause of" not in response.text
    (record,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert record.message == f"responded {status}: LookupError: cause of {name}"
    assert record.levelname == level
    assert bool(record.exc_info) is has_traceback


async def test_cause_of_a_4xx_is_not_logged(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    assert (await http.get("/caused/conflict")).status_code == 409
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []


def test_openapi_describes_codes_and_headers() -> None:
    responses = problem_responses(401, 429, ConflictError, SeatTakenError, ServiceError)
    content = responses[409]["content"][MEDIA_TYPE]
    assert content["schema"]["properties"]["code"]["enum"] == ["conflict", "seat_taken"]
    assert "WWW-Authenticate" in responses[401]["headers"]
    assert "Retry-After" in responses[429]["headers"]
    assert "enum" not in responses[500]["content"][MEDIA_TYPE]["schema"]["properties"]["code"]


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
