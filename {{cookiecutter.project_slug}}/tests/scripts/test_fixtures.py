"""The fixtures for tests of features: clean databases, streams, the real process."""

from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI, WebSocket
from fastapi.sse import EventSourceResponse, ServerSentEvent

from app.main import create_app
from app.settings import Settings
from app.storage.postgres import Database
from scripts.dev_services import Redis
from scripts.feature.names import POSTGRES_RESERVED
from tests.conftest import InProcess
from tests.service_process import Service, serving
from tests.streams import Client, Event, RejectedError, parse_events


@pytest.mark.parametrize("number", [1, 2])
async def test_database_is_clean_for_each_test(
    database: Database, settings: Settings, number: int
) -> None:
    """It has the migrations, and nothing of another test."""
    assert await database.pool.fetchval("select count(*) from alembic_version") <= 1
    await database.pool.execute("create table of_this_test ()")
    assert database.url == settings.database_url.get_secret_value()
    assert settings.redis_key_prefix in database.url, number


async def test_database_is_that_of_the_client(
    client: httpx.AsyncClient, database: Database, settings: Settings
) -> None:
    assert (await client.get("/health/ready")).status_code == 200
    query = "select count(*) from pg_stat_activity where application_name like '%-api%'"
    query += " and datname = current_database()"
    assert await database.pool.fetchval(query) > 0


def test_service_is_the_real_process(service: Service, clean_database: str) -> None:
    assert service.get("/").status_code == 200
    assert "http_server_active_requests" in service.metrics()
    assert service.process.poll() is None


def test_real_process_has_streams_as_well(database_url: str, redis: Redis) -> None:
    """Routes of tests/fault_routes.py."""
    variables = {"DATABASE_URL": database_url, "REDIS_URL": redis.url, "WEB_CONCURRENCY": "1"}
    with serving("tests.fault_routes:app", **variables) as service:
        service.wait()
        with service.events("/events?seconds=30") as events:
            assert isinstance(next(events), Event)
        with service.websocket("/echo") as websocket:
            websocket.send("hello")
            assert websocket.recv() == "hello"


def with_streams(settings: Settings) -> FastAPI:
    """The application with a route of events and one of a WebSocket."""
    app = create_app(settings)

    @app.get("/events", response_class=EventSourceResponse)
    async def events(number: int) -> AsyncIterator[ServerSentEvent]:
        for each in range(number):
            yield ServerSentEvent(data=each, event="number", id=str(each))

    @app.websocket("/echo")
    async def echo(websocket: WebSocket) -> None:
        if websocket.headers.get("x-allowed") != "yes":
            await websocket.close()
            return
        await websocket.accept()
        async for text in websocket.iter_text():
            if text == "close":
                await websocket.close(4000)
                return
            await websocket.send_text(text)

    return app


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[Client]:
    """A client of the application with these routes."""
    async with InProcess(with_streams(settings)) as client:
        yield client


async def test_client_reads_server_sent_events(client: Client) -> None:
    async with client.events("/events?number=2") as events:
        found = [event async for event in events]
    assert found == [Event("0", "number", "0"), Event("1", "number", "1")]


async def test_client_may_leave_a_stream(client: Client) -> None:
    async with client.events("/events?number=1000000") as events:
        assert (await anext(events)).data == "0"


async def test_client_talks_over_a_websocket(client: Client) -> None:
    async with client.websocket("/echo", {"x-allowed": "yes"}) as websocket:
        await websocket.send("hello")
        assert await websocket.receive() == "hello"
        await websocket.send("close")
        with pytest.raises(RejectedError) as closed:
            await websocket.receive()
    assert closed.value.code == 4000


async def test_rejected_websocket_is_reported(client: Client) -> None:
    with pytest.raises(RejectedError):
        async with client.websocket("/echo"):
            pass


def test_events_are_parsed_as_html_defines_them() -> None:
    """HTML, section 9.2.6: several lines of data, comments, a reconnection time, no data."""
    text = ": comment\nretry: 5\n\ndata: a\ndata:b\n\nevent: x\n\ndata: c\nevent: y\nid: 7\n\n"
    assert list(parse_events(text.split("\n"))) == [Event("a\nb"), Event("c", "y", "7")]


async def test_reserved_words_of_postgres_are_no_names_of_features(database: Database) -> None:
    """Postgres, "SQL Key Words"; a newer version may have more of them."""
    query = "select word from pg_get_keywords() where catcode in ('R', 'T')"
    reserved = {row["word"] for row in await database.pool.fetch(query)}
    assert reserved <= POSTGRES_RESERVED
