"""The service with routes whose spans tests look at."""

import logging

from fastapi import BackgroundTasks, WebSocket
from opentelemetry import trace

from app.errors import UnavailableError
from app.main import create_app
from app.settings import load_settings
from app.storage.postgres import Database, DatabaseDependency
from app.storage.redis import RedisDependency

#: A password, which no span may contain.
SECRET = "hunter2"

app = create_app(load_settings())
logger = logging.getLogger("tests")


@app.get("/items/{number}")
async def work(number: int, database: DatabaseDependency, redis: RedisDependency) -> int:
    """Make a query in a transaction, a command, a pipeline, and a span by OpenTelemetry's API."""
    async with database.acquire() as connection, connection.transaction():
        query = "select count(*) from pg_class where relname <> $1 and relname <> 'hunter2'"
        await connection.fetchval(query, SECRET)
    await redis.set(redis.key(SECRET), SECRET, ex=60)
    async with redis.pipeline() as pipeline:
        pipeline.get(redis.key(SECRET))
        pipeline.delete(redis.key(SECRET))
        await pipeline.execute()
    with trace.get_tracer("tests").start_as_current_span("own"):
        logger.info("within a span")
    logger.info("within the request")
    return number


@app.get("/annotated")
def annotated() -> None:
    """Add to the span of the request, from a thread, between two spans."""
    tracer = trace.get_tracer("tests")
    with tracer.start_as_current_span("before"):
        pass
    span = trace.get_current_span()
    span.set_attribute("order.id", 7)
    span.add_event("priced", {"order.total": 1250})
    with tracer.start_as_current_span("after"):
        pass


@app.get("/failing-query")
async def failing_query(database: DatabaseDependency) -> None:
    """Fail in Postgres, with a value in the message."""
    async with database.acquire() as connection:
        await connection.execute("select $1::text::int", SECRET)


@app.get("/bug")
async def bug() -> None:
    """Raise."""
    raise ZeroDivisionError(SECRET)


@app.get("/unavailable")
async def unavailable() -> None:
    """Raise an error of the service."""
    raise UnavailableError(SECRET)


@app.get("/after")
async def after(tasks: BackgroundTasks) -> None:
    """Log after the response."""
    tasks.add_task(logger.info, "after the response")


@app.websocket("/socket")
async def socket(websocket: WebSocket) -> None:
    """Make a query for each message."""
    database: Database = websocket.state.database
    await websocket.accept()
    async for _ in websocket.iter_text():
        async with database.acquire() as connection:
            await websocket.send_json(await connection.fetchval("select 1"))
