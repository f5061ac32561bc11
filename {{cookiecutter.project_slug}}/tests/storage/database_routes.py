"""The service with routes that meet conflicts in Postgres."""

from fastapi import Response

from app.main import create_app
from app.settings import load_settings
from app.storage.postgres import Connection, DatabaseDependency
from app.storage.redis import RedisDependency

app = create_app(load_settings())


@app.post("/transfers")
async def transfer(database: DatabaseDependency, row: int) -> Response:
    """Change a row of two tables in one transaction."""

    async def work(connection: Connection) -> None:
        async with connection.transaction():
            await connection.execute("update conflict_second set n = n + 1 where id = $1", row)
            await connection.execute("update conflict_first set n = n + 1 where id = $1", row)

    await database.retry(work)
    return Response(status_code=204)


@app.get("/rows")
async def read(database: DatabaseDependency, row: int, kind: str) -> Response:
    """Read a row in a transaction, by a column whose type is changed."""

    async def work(connection: Connection) -> None:
        async with connection.transaction(readonly=True):
            await connection.fetchrow(
                "select id, n, kind from conflict_first where id = $1 and kind = $2", row, kind
            )

    await database.retry(work)
    return Response(status_code=204)


@app.post("/errors")
async def fail(database: DatabaseDependency, sqlstate: str) -> None:
    """Raise an error at the server, outside of a retry."""
    async with database.acquire() as connection, connection.transaction():
        await raise_error(connection, sqlstate)


@app.post("/cache")
async def store(redis: RedisDependency) -> Response:
    """Store a value in Redis."""
    await redis.set("database_routes", "value", ex=60)
    return Response(status_code=204)


async def raise_error(connection: Connection, sqlstate: str) -> None:
    """Have the server raise an error, which ends the transaction."""
    assert sqlstate.isalnum()
    await connection.execute(f"do $$ begin raise exception sqlstate '{sqlstate}'; end $$")
