"""List failed jobs, run them again, or delete one: `make parked`.

Usage: `python -m scripts.parked [--again ID|all | --drop ID]`. A job has failed when a retry cannot
help, or after its last attempt. It keeps its key: to enqueue the same key again changes nothing.
"""

import argparse
import asyncio
import sys
from collections.abc import Iterable, Sequence
from typing import Any
from uuid import UUID

import asyncpg

from app.settings import load_settings
from app.storage.postgres import connect

CONNECT_SECONDS = 10
#: Rows that are shown.
MAX_SHOWN = 100
#: Characters of an error that are shown.
MAX_ERROR = 200
HEADINGS = ("JOB ID", "TYPE", "ATTEMPTS", "FAILED (UTC)", "ERROR")
_LIST = """
    select job_id, type, attempts, to_char(finished_at at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS'),
        coalesce(error, '')
    from jobs where status = 'failed' order by finished_at desc, job_id limit $1
"""
_COUNT = "select count(*) from jobs where status = 'failed'"
_AGAIN = """
    update jobs set status = 'queued', attempts = 0, run_at = now(), published_at = null,
        finished_at = null, error = null
    where status = 'failed' and ($1::uuid is null or job_id = $1)
"""
_DROP = "delete from jobs where status = 'failed' and job_id = $1"


async def show(connection: asyncpg.Connection) -> None:
    """Print the failed jobs, the newest first, and what to do with them."""
    total = await connection.fetchval(_COUNT)
    if total == 0:
        sys.stdout.write("No job has failed.\n")
        return
    rows = await connection.fetch(_LIST, MAX_SHOWN)
    cells = [[*map(str, row.values())] for row in rows]
    for line in table([HEADINGS, *([*row[:-1], one_line(row[-1])] for row in cells)]):
        sys.stdout.write(f"{line}\n")
    if total > len(rows):
        sys.stdout.write(f"... and {total - len(rows)} older ones\n")
    sys.stdout.write(
        f"\nFailed jobs: {total}. Fix the cause, then run them again:\n"
        "  make parked AGAIN=all    every one; AGAIN=ID for one of them\n"
        "  make parked DROP=ID      delete one for good\n"
    )


def table(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Yield the rows with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def one_line(text: str) -> str:
    """Return the start of a text, without line breaks and other control characters."""
    printable = "".join(each if each.isprintable() else " " for each in text)
    return " ".join(printable.split())[:MAX_ERROR]


async def run_again(connection: asyncpg.Connection, which: str) -> None:
    """Enqueue a failed job again, or all of them; their attempts count from 0."""
    job_id = None if which == "all" else parse_id("AGAIN", which, ", or all")
    count = affected(await connection.execute(_AGAIN, job_id))
    if job_id and not count:
        await fail_as_not_failed(connection, "AGAIN", job_id)
    sys.stdout.write(f"Enqueued again: {count}. A worker runs them, see `make work`.\n")


async def drop(connection: asyncpg.Connection, which: str) -> None:
    """Delete a failed job."""
    job_id = parse_id("DROP", which)
    if not affected(await connection.execute(_DROP, job_id)):
        await fail_as_not_failed(connection, "DROP", job_id)
    sys.stdout.write(f"Deleted: {job_id}.\n")


def affected(status: str) -> int:
    """Return the number of rows of a command's status, such as `UPDATE 3`."""
    return int(status.split()[-1])


def parse_id(name: str, text: str, alternative: str = "") -> UUID:
    """Return the ID. Raises `SystemExit` if it is none."""
    try:
        return UUID(text)
    except ValueError:
        sys.exit(f"{name}={text}: must be the ID of a failed job{alternative}; see `make parked`")


async def fail_as_not_failed(connection: asyncpg.Connection, name: str, job_id: UUID) -> None:
    """Raise `SystemExit` with the status of the job."""
    status = await connection.fetchval("select status from jobs where job_id = $1", job_id)
    problem = f"the job is {status}, not failed" if status else "there is no such job"
    sys.exit(f"{name}={job_id}: {problem}; see `make parked`")


async def main(arguments: list[str]) -> None:
    """Do as the arguments say. Raises `SystemExit` with one line if that is impossible."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options = parser.add_mutually_exclusive_group()
    options.add_argument("--again", metavar="ID|all", help="run a failed job again, or all")
    options.add_argument("--drop", metavar="ID", help="delete a failed job")
    chosen: Any = parser.parse_args(arguments)
    url = load_settings().database_url.get_secret_value()
    try:
        connection = await connect(url, timeout=CONNECT_SECONDS)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        sys.exit(f"DATABASE_URL: cannot connect: {error or type(error).__name__}")
    try:
        await act(connection, chosen)
    except asyncpg.UndefinedTableError:
        sys.exit("the database has no table of jobs: run `make migrate`")
    finally:
        await connection.close()


async def act(connection: asyncpg.Connection, chosen: Any) -> None:
    """List, run again, or delete."""
    if chosen.again:
        await run_again(connection, chosen.again)
    elif chosen.drop:
        await drop(connection, chosen.drop)
    else:
        await show(connection)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
