"""The worker of the tests, without one of its guards if TEST_WITHOUT names it."""

import os
import time

from app.jobs import starts
from app.jobs.handlers import Run, handlers
from tests.jobs import work, worker

GUARD = os.environ.get("TEST_WITHOUT")
FENCE = "and starts = $2 and status = 'running'"
#: Suspects are claimed like other jobs, and run together.
EITHER = "(status = 'queued' or lease_until < now())"
WITHOUT = {
    # A start that was superseded ends its job as well.
    "fence": {"_SUCCEED": starts._SUCCEED.replace(FENCE, "and $2 > 0")},
    "alone": {
        "_CLAIM_DUE": starts._CLAIM_DUE.replace("status = 'queued'", EITHER),
        "_CLAIM": starts._CLAIM.replace("status = 'queued'", EITHER),
        "_FIND_EXPIRED": "select null::uuid",
        "_HAS_EXPIRED": "select $1::uuid is null",
    },
}


@handlers.add("block", work.Seconds, attempts=2)
async def block(run: Run, payload: work.Seconds) -> None:
    """Block the event loop, so that nothing else of the worker runs."""
    time.sleep(payload.seconds)
    await work.take_effect(run)


@handlers.add("neighbor", work.Seconds, attempts=2)
async def neighbor(run: Run, payload: work.Seconds) -> None:
    """Wait. A job that kills its worker may cost one attempt, and has more itself."""
    await work.wait(run, payload)


if __name__ == "__main__":
    if GUARD:
        for name, statement in WITHOUT[GUARD].items():
            assert statement != getattr(starts, name)
            setattr(starts, name, statement)
    worker.main()
