"""Handlers for tests. Each effect is a row of the table `effects`, which has no unique key."""

import asyncio
import logging
import os
import signal
import time

from pydantic import BaseModel

from app.errors import UnavailableError
from app.jobs.handlers import LaterError, PoisonError, Run, handlers

ATTEMPTS = 3
TIMEOUT_SECONDS = 1.0
logger = logging.getLogger("tests.jobs")


class Nothing(BaseModel):
    """A payload without content."""


class Seconds(BaseModel):
    """How long a job takes."""

    seconds: float = 0.0


class Score(BaseModel):
    """A result."""

    score: int


async def take_effect(run: Run, result: BaseModel | None = None) -> None:
    async with run.done(result) as connection:
        query = "insert into effects (job_id, starts) values ($1, $2)"
        await connection.execute(query, run.job.job_id, run.job.starts)


def fall_asleep(seconds: float) -> int:
    logging.getLogger("tests.jobs").info("computing")
    time.sleep(seconds)
    return os.getpid()


def exit_at_once() -> None:
    os._exit(3)


@handlers.add("wait", Seconds, attempts=5)
async def wait(run: Run, payload: Seconds) -> None:
    await asyncio.sleep(payload.seconds)
    await take_effect(run, Score(score=1))


@handlers.add("compute", Seconds, attempts=ATTEMPTS, timeout_seconds=30)
async def compute(run: Run, payload: Seconds) -> None:
    logger.info("before the computation")
    await run.processes.run(fall_asleep, payload.seconds)
    await take_effect(run)


@handlers.add("hang", Seconds, attempts=2, timeout_seconds=TIMEOUT_SECONDS)
async def hang(run: Run, payload: Seconds) -> None:
    await run.processes.run(fall_asleep, payload.seconds)


@handlers.add("crash", Nothing, attempts=ATTEMPTS)
async def crash(run: Run, _: Nothing) -> None:
    await run.processes.run(exit_at_once)


@handlers.add("kill", Nothing, attempts=ATTEMPTS)
async def kill(run: Run, _: Nothing) -> None:
    await asyncio.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)


@handlers.add("raise", Nothing, attempts=ATTEMPTS)
async def fail(run: Run, _: Nothing) -> None:
    msg = "no luck\x00"
    raise ValueError(msg)


@handlers.add("exit", Nothing, attempts=1)
async def leave(run: Run, _: Nothing) -> None:
    raise SystemExit(3)


class AbortError(BaseException):
    """An error that `except Exception` does not catch."""


@handlers.add("abort", Nothing, attempts=1)
async def abort(run: Run, _: Nothing) -> None:
    raise AbortError


@handlers.add("never", Nothing, attempts=1)
async def postpone_forever(run: Run, _: Nothing) -> None:
    msg = "the rate limit has no end"
    raise LaterError(msg, float("inf"))


@handlers.add("poison", Nothing)
async def poison(run: Run, _: Nothing) -> None:
    msg = "there is no such conversation"
    raise PoisonError(msg)


@handlers.add("later", Nothing, attempts=1)
async def later(run: Run, _: Nothing) -> None:
    if run.job.starts < 3:
        msg = "the gateway is closed"
        raise LaterError(msg, 0.01)
    await take_effect(run)


@handlers.add("outage", Nothing, attempts=1)
async def meet_outage(run: Run, _: Nothing) -> None:
    if run.job.starts < 3:
        msg = "The gateway is not available."
        raise UnavailableError(msg)
    await take_effect(run)


@handlers.add("rollback", Nothing, attempts=1)
async def roll_back(run: Run, _: Nothing) -> None:
    """Take effect, and fail at the commit: the constraint is checked there."""
    async with run.done() as connection:
        query = "insert into effects (job_id, starts, unique_at_commit) values ($1, 1, 1)"
        await connection.execute(query, run.job.job_id)


@handlers.add("forget", Nothing)
async def forget(run: Run, _: Nothing) -> None:
    """Do not end the job."""


@handlers.add("slow", Nothing, attempts=2)
async def query_slowly(run: Run, _: Nothing) -> None:
    async with run.database.acquire() as connection:
        await connection.execute("select pg_sleep(60)", timeout=0.2)
