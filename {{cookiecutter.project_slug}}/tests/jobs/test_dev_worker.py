"""The worker of `make dev`: it does jobs at once, with the newest code, and leaves nothing."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import asyncpg
import httpx
import psutil
import pytest

from scripts.dev_services import free_port
from tests.scripts.test_dev import Dev, copied, insert
from tests.service_process import eventually

pytestmark = pytest.mark.process

#: A feature with a handler.
PLANTED = '''"""Planted."""

from pydantic import BaseModel

from app.jobs.handlers import Run, handlers


class Content(BaseModel):
    number: int = 1


@handlers.add("planted", Content)
async def handle(run: Run, content: Content) -> None:
    async with run.done(content):
        pass
'''
IMPORT = "import app.planted  # noqa: F401\n"
CREATE = "insert into jobs (type, payload) values ('planted', '{}') returning job_id"
DEADLINE_SECONDS = 30.0


@pytest.fixture(scope="module")
def dev() -> Iterator[Dev]:
    free = {name: f"127.0.0.1:{free_port()}" for name in ("BIND", "METRICS_BIND")}
    with copied() as directory:
        running = Dev(directory, **free, LOG_FORMAT="json")
        try:
            running.wait_until_ready()
            yield running
        finally:
            running.close()


def worker_pids(dev: Dev) -> set[int]:
    """Return the pids of the worker that runs now, if any."""
    found = set()
    for process in dev.family():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "app.jobs_main" in process.cmdline():
                found.add(process.pid)
    return found


def is_replaced(dev: Dev, workers: set[int]) -> bool:
    """Return whether another worker runs, and none of these."""
    now = worker_pids(dev)
    return bool(now) and not now & workers


async def result_of_a_new_job(dev: Dev) -> Any:
    """Create a job; return its result."""
    connection = await asyncpg.connect(dev.address("database"))
    job_id = await connection.fetchval(CREATE)
    end = time.monotonic() + DEADLINE_SECONDS
    result = None
    while result is None and time.monotonic() < end:
        result = await connection.fetchval("select result from jobs where job_id = $1", job_id)
    await connection.close()
    return json.loads(result or "null")


async def test_changes_of_a_handler_reload(dev: Dev) -> None:
    planted = dev.directory / "app/planted.py"
    planted.write_text(PLANTED)
    insert(dev.directory / "app/jobs_main.py", "from app import process\n", IMPORT)
    eventually(lambda: "app/jobs_main.py" in dev.text)
    for number in (2, 3):
        workers = worker_pids(dev)
        planted.write_text(PLANTED.replace("= 1", f"= {number}"))
        eventually(partial(is_replaced, dev, workers))
        assert await result_of_a_new_job(dev) == {"number": number}


def test_guide_has_an_address_that_shows_the_metrics(dev: Dev) -> None:
    _, _, rest = dev.text.partition("A worker does the jobs, which Postgres hands out.")
    (url,) = [word for word in rest.split()[:20] if word.startswith("http://")]
    eventually(lambda: "jobs_handled_total" in httpx.get(url).text)


def test_ctrl_c_ends_the_worker_too(dev: Dev) -> None:
    family = dev.family()
    assert worker_pids(dev)
    os.killpg(dev.process.pid, signal.SIGINT)
    eventually(lambda: dev.text is not None and dev.ended)
    assert dev.process.returncode == 0
    _, alive = psutil.wait_procs(family, 10)
    assert alive == []
    assert "Traceback" not in dev.text
