"""The generated service with CPU-heavy work, in three places."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from app.main import create_app
from app.settings import load_settings
from fastapi import FastAPI, Request

STEPS = 400_000


def work() -> int:
    """Keep a CPU busy for some ten milliseconds in Python, as a parser or a template does."""
    return sum(number * number % 7 for number in range(STEPS))


app = create_app(load_settings())
lifespan = app.router.lifespan_context


@contextlib.asynccontextmanager
async def with_processes(app: FastAPI) -> AsyncIterator[dict[str, object]]:
    """Add a process pool. `spawn`, since a fork would copy the worker's sockets and threads."""
    async with lifespan(app) as state:
        with ProcessPoolExecutor(1, get_context("spawn")) as processes:
            await asyncio.get_running_loop().run_in_executor(processes, work)
            yield {**(state or {}), "processes": processes}


app.router.lifespan_context = with_processes


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
    return await asyncio.get_running_loop().run_in_executor(request.state.processes, work)
