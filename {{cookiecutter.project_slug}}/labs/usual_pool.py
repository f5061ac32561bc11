"""A service with the usual pool of connections: its callers wait without end.

asyncpg has no time limit for `acquire` and none for a query, unless a caller sets them.
"""

import contextlib
import os
from collections.abc import AsyncIterator

import asyncpg
from fastapi import FastAPI, Request


@contextlib.asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, asyncpg.Pool]]:
    """Yield the pool. Its size is that of one worker of this template."""
    async with asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1, max_size=7) as pool:
        yield {"pool": pool}


app = FastAPI(lifespan=lifespan)


@app.get("/health/ready")
async def ready() -> str:
    """Respond."""
    return "ready"


@app.get("/payments")
async def list_payments(request: Request) -> int:
    """Read the table."""
    async with request.state.pool.acquire() as connection:
        return len(await connection.fetch("select payment_id from payments limit 50"))
