"""The service with a route that keeps a connection to Postgres."""

from app.storage.postgres import DatabaseDependency
from tests.fault_routes import app

__all__ = ["app"]


@app.get("/hold")
async def hold(seconds: float, database: DatabaseDependency) -> None:
    """Use a connection for this time."""
    async with database.acquire() as connection:
        await connection.execute("select pg_sleep($1)", seconds)
