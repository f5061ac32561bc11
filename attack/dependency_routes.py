"""The service with routes that use Postgres or Redis longer than the example."""

from app.main import create_app
from app.settings import load_settings
from app.storage.postgres import DatabaseDependency
from app.storage.redis import RedisDependency

app = create_app(load_settings())


@app.get("/bug")
async def bug() -> None:
    """Raise."""
    msg = "a bug"
    raise RuntimeError(msg)


@app.get("/cached")
async def cached(redis: RedisDependency) -> int:
    """Write to Redis and read it back."""
    await redis.set("number", 1)
    return int(await redis.get("number") or 0)


@app.get("/read")
async def read(database: DatabaseDependency) -> int:
    """Read once; retry if the connection is lost."""
    value: int = await database.retry(lambda connection: connection.fetchval("select 1"))
    return value


@app.get("/sleep")
async def sleep(database: DatabaseDependency, seconds: float) -> str:
    """Hold a connection to Postgres for a duration."""
    async with database.acquire() as connection:
        await connection.execute("select pg_sleep($1)", seconds)
    return "done"


@app.get("/transaction")
async def transaction(database: DatabaseDependency) -> int:
    """Read twice in one transaction."""
    async with database.acquire() as connection, connection.transaction():
        await connection.execute("select")
        value: int = await connection.fetchval("select 1")
        return value
