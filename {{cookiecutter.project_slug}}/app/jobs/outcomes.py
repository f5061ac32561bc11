"""The outcome of a start: the job is done, is retried, or has failed."""

import logging
import random
from typing import NamedTuple

from app.errors import UnavailableError
from app.jobs import starts
from app.jobs.handlers import LaterError, PoisonError
from app.jobs.starts import Job, SupersededError
from app.storage.postgres import Connection
from app.storage.postgres_errors import CommandTimeoutError
from app.telemetry.logs import safe_str

#: The pause after the first failed start, the factor by which it grows, its limit, and its spread.
FIRST_SECONDS = 5.0
FACTOR = 4
MAX_SECONDS = 3600.0
SPREAD = 0.25
#: The pause after a start that met an outage.
OUTAGE_SECONDS = 5.0


class Outcome(NamedTuple):
    """The future of the job. `name` is the label of `jobs_handled_total`."""

    name: str
    reason: str = ""
    delay_seconds: float = 0.0
    #: Whether this start counts as an attempt.
    is_counted: bool = True
    #: Logged with its traceback.
    error: BaseException | None = None


#: The job has succeeded, or takes effect no more: the row is up to date in both cases.
DONE = Outcome("done")
STALE = Outcome("stale")
#: The level and the text of the log line, by name.
LOG_LINES = {
    "done": (logging.INFO, "job done"),
    "stale": (logging.INFO, "job superseded: cancelled, or started again"),
    "later": (logging.INFO, "job postponed"),
    "again": (logging.WARNING, "job failed, will be retried"),
    "failed": (logging.ERROR, "job failed"),
}


def outcome_of(error: BaseException, attempts: int, max_attempts: int) -> Outcome:
    """Return the outcome of a start that has raised. `attempts` counts this start too."""
    text = _describe(error)
    if isinstance(error, SupersededError):
        return STALE
    if isinstance(error, PoisonError):
        return Outcome("failed", text)
    if isinstance(error, LaterError):
        return Outcome("later", text, error.seconds, is_counted=False)
    # A command of the job that exceeds its time limit counts: it may be too slow forever.
    if isinstance(error, UnavailableError) and not isinstance(error, CommandTimeoutError):
        return Outcome("later", text, _spread(OUTAGE_SECONDS), is_counted=False)
    if attempts >= max_attempts:
        return Outcome("failed", text, error=error)
    return Outcome("again", text, backoff_seconds(attempts), error=error)


def backoff_seconds(attempts: int) -> float:
    """Return the pause after a failed start: about 5 s, 20 s, 80 s and so on, up to an hour."""
    # The exponent is limited, or a large one would overflow.
    growth = FACTOR ** min(attempts - 1, 10)
    return _spread(min(FIRST_SECONDS * growth, MAX_SECONDS))


async def store(connection: Connection, job: Job, outcome: Outcome) -> None:
    """Store the outcome, unless the job has ended or a newer start has begun."""
    if outcome.name == "failed":
        await starts.fail(connection, job, outcome.reason, is_counted=outcome.is_counted)
    elif outcome.name in {"again", "later"}:
        await starts.retry(
            connection, job, outcome.delay_seconds, outcome.reason, is_counted=outcome.is_counted
        )


def _describe(error: BaseException) -> str:
    """Return class and message of an error, as Postgres accepts it."""
    text = f"{type(error).__name__}: {safe_str(error)}"[: starts.MAX_ERROR].replace("\x00", "")
    return text.encode(errors="backslashreplace").decode()


def _spread(seconds: float) -> float:
    """Return a random time near this one: jobs that fail together do not return together."""
    return seconds * random.uniform(1 - SPREAD, 1 + SPREAD)  # noqa: S311
