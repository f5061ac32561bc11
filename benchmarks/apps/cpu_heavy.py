"""The generated service with CPU-heavy work, in three places."""

import contextlib
from collections.abc import AsyncIterator

from app.main import create_app
from app.process_pool.pool import ProcessPool
from app.settings import load_settings
from fastapi import FastAPI, Request
from heavy_work import work

settings = load_settings()
app = create_app(settings)
lifespan = app.router.lifespan_context


@contextlib.asynccontextmanager
async def with_pool(app: FastAPI) -> AsyncIterator[dict[str, object]]:
    """Add a process pool. Features open theirs in app/lifespan.py."""
    async with lifespan(app) as state, ProcessPool(settings) as pool:
        await pool.wait_until_warm()
        yield {**(state or {}), "pool": pool}


app.router.lifespan_context = with_pool


@app.get("/in-the-loop")
async def in_the_loop() -> int:
    """Block the event loop, and so every other request of this worker."""
    return work()


@app.get("/in-a-thread")
def in_a_thread() -> int:
    """Run in a thread: it and the event loop take turns at the interpreter's lock."""
    return work()


@app.get("/in-a-process")
async def in_a_process(request: Request) -> int:
    """Run in another process: the event loop only waits."""
    pool: ProcessPool = request.state.pool
    return await pool.run(work)
