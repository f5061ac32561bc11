"""A worker whose jobs wait, compute and store, as those of a feature do.

The variables of its environment say for how long, and where the computation runs.
"""

import asyncio
import os

import job_work
from app import jobs_main
from app.jobs.handlers import Run, handlers
from pydantic import BaseModel

WAIT_SECONDS = float(os.environ.get("WAIT_SECONDS", "0.05"))
STEPS = int(os.environ.get("STEPS", "300000"))
PLACE = os.environ.get("PLACE", "process")


class Payload(BaseModel):
    """Nothing: every job is the same."""


@handlers.add("figure", Payload)
async def work(run: Run, _: Payload) -> None:
    """Wait as for another service, compute, store."""
    await asyncio.sleep(WAIT_SECONDS)
    if PLACE == "process":
        await run.processes.run(job_work.compute, STEPS)
    elif PLACE == "thread":
        await asyncio.to_thread(job_work.compute, STEPS)
    elif PLACE == "loop":
        job_work.compute(STEPS)
    async with run.done() as connection:
        await connection.execute("insert into effects (job_id) values ($1)", run.job.job_id)


if __name__ == "__main__":
    jobs_main.main()
