"""A worker of this template, whose jobs are the messages of lab 9.

WAIT_SECONDS and STEPS are those of labs/prefetching_consumer.py, and so is the work.
"""

import asyncio
import os

from pydantic import BaseModel

from app import jobs_main
from app.jobs.handlers import Run, handlers
from labs.computation import KIND, compute


class Message(BaseModel):
    """Nothing: every message is the same."""


@handlers.add(KIND, Message)
async def handle(run: Run, _: Message) -> None:
    """Wait as for another service, compute in a process, store."""
    await asyncio.sleep(float(os.environ["WAIT_SECONDS"]))
    await run.processes.run(compute, int(os.environ["STEPS"]))
    async with run.done() as connection:
        await connection.execute("insert into lab_effects (job_id) values ($1)", run.job.job_id)


if __name__ == "__main__":
    jobs_main.main()
