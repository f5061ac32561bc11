"""The service with a process pool, and routes whose work runs in it."""

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request

from app.process_pool.pool import ProcessPool
from tests.fault_routes import app
from tests.process_pool import work

__all__ = ["app"]

lifespan = app.router.lifespan_context


@contextlib.asynccontextmanager
async def with_pool(app: FastAPI) -> AsyncIterator[dict[str, object]]:
    settings = app.state.settings
    async with lifespan(app) as state, ProcessPool(settings, max_waiting=1) as pool:
        await pool.wait_until_warm()
        yield {**(state or {}), "pool": pool}


app.router.lifespan_context = with_pool


@app.get("/pool/sleep")
async def sleep(request: Request, seconds: float, limit: float | None = None) -> int:
    pool: ProcessPool = request.state.pool
    return await pool.run(work.sleep, seconds, timeout_seconds=limit)


@app.get("/pool/{name}")
async def run(request: Request, name: str) -> object:
    pool: ProcessPool = request.state.pool
    return await pool.run(getattr(work, name))


@app.get("/calls")
async def calls(request: Request) -> int:
    """Return the number of calls that run or wait."""
    pool: ProcessPool = request.state.pool
    return pool.size - len(pool.idle) + len(pool.waiting)
