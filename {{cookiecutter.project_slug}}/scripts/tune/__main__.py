"""Measure processes and jobs at once on this machine: `make tune`.

Users send requests that create jobs, while a worker does them: one point of the grid for each
number of processes and of jobs at once. Postgres and Redis are temporary ones of this run.
"""

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from app.sizing.resources import detect_resources
from scripts.dev_data import directory
from scripts.dev_services import free_port
from scripts.tune import advice, plot, table
from scripts.tune.point import Point, measure
from scripts.tune.recipe import prepare
from scripts.tune.servers import Servers, TuneError, servers
from scripts.tune.users import Request, RequestError, Users

#: The rate for which workers are planned, unless RATE is set.
JOBS_PER_SECOND = 100.0


class Recipe(NamedTuple):
    """The load, and the points to measure: processes and jobs at once."""

    users: int
    requests: int
    points: list[tuple[int, int]]


def choose_recipe(cpus: int, *, is_quick: bool) -> Recipe:
    """Return the whole recipe, or one of four points that takes half a minute."""
    if is_quick:
        several = max(2, cpus)
        return Recipe(20, 60, [(1, 1), (1, 8), (several, 1), (several, 8)])
    processes = sorted({1, cpus, 2 * cpus})
    points = [(each, concurrency) for each in processes for concurrency in (1, 2, 4, 8, 16, 32)]
    return Recipe(100, 500, points)


def refuse_outside_development() -> None:
    """Raise `TuneError` unless this is a development machine: the jobs are done for real."""
    environment = os.environ.get("ENVIRONMENT") or "development"
    if environment.lower() != "development":
        msg = f"ENVIRONMENT={environment}: jobs are done for real; unset it on your own machine"
        raise TuneError(msg)


def read_rate() -> float:
    """Return the jobs per second of RATE. Raises `TuneError`."""
    text = os.environ.get("RATE") or str(JOBS_PER_SECOND)
    try:
        rate = float(text)
    except ValueError:
        rate = 0
    if not 0 < rate < float("inf"):
        msg = f"RATE={text}: must be a number of jobs per second, for example RATE=200"
        raise TuneError(msg)
    return rate


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


async def measure_all(running: Servers, recipe: Recipe) -> list[Point]:
    """Measure each point, and print its line."""
    port = free_port()
    points: list[Point] = []
    async with running.api(port):
        users = Users(port, recipe.users)
        requests = await prepare_all(users, recipe.requests)
        say(table.HEADER)
        for number, (processes, concurrency) in enumerate(recipe.points, 1):
            report_progress(f"point {number} of {len(recipe.points)} ...")
            point = await measure(running, users, requests, processes, concurrency)
            report_progress("")
            say(table.line(point))
            points.append(point)
        users.close()
    return points


async def prepare_all(users: Users, number: int) -> list[Request]:
    """Return a request for each job."""
    report_progress(f"preparing {number} requests ...")
    try:
        requests = [await prepare(users.send) for _ in range(number)]
    except RequestError as error:
        msg = f"{error}; scripts/tune/recipe.py has the requests"
        raise TuneError(msg) from error
    report_progress("")
    return requests


def report_progress(text: str) -> None:
    """Show a line that the next one replaces, if someone is looking."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def write_plot(points: Sequence[Point], title: str) -> Path:
    """Write the plot; return its path."""
    path = directory() / "tune.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(plot.draw(points, advice.best_point(points), title))
    return path


def main() -> None:
    """Measure, then print the table, the advice, and where the plot is."""
    try:
        refuse_outside_development()
        rate = read_rate()
        cpus = max(1, round(detect_resources().cpus))
        recipe = choose_recipe(cpus, is_quick=bool(os.environ.get("QUICK")))
        load = f"{recipe.users} users, {recipe.requests} requests, {cpus} CPUs"
        say(f"{load}; on temporary servers, so your own data is not touched\n")
        start = time.monotonic()
        with servers() as running:
            points = asyncio.run(measure_all(running, recipe))
    except TuneError as error:
        report_progress("")
        sys.exit(f"tune: {error}")
    except KeyboardInterrupt:
        sys.exit("\ntune: interrupted")
    say(f"\n{advice.advise(points, cpus, rate)}")
    path = write_plot(points, f"make tune: {load}")
    say(f"{path} has the plot; this took {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
