"""Which point is the best one, and why."""

import math
from collections.abc import Sequence
from typing import Protocol, TypeVar

from scripts.tune.point import Point

#: Of the highest rate. A few percent more cost a multiple of the time that a job takes.
ENOUGH = 0.9
#: The part of a worker's rate that is planned with: the rest is for peaks.
PLANNED = 2 / 3


class Measured(Protocol):
    """The figures of a point that decide."""

    @property
    def processes(self) -> int:
        """The processes for computations."""

    @property
    def concurrency(self) -> int:
        """The jobs at once."""

    @property
    def jobs_per_second(self) -> float:
        """The rate."""


AnyPoint = TypeVar("AnyPoint", bound=Measured)


def best_point(points: Sequence[AnyPoint]) -> AnyPoint:
    """Return the point with the fewest processes, then jobs at once, that is fast enough."""
    highest = max(point.jobs_per_second for point in points)
    fast = [point for point in points if point.jobs_per_second >= ENOUGH * highest]
    return min(fast, key=lambda point: (point.processes, point.concurrency))


def balanced_concurrency(alone: Point, cpus: int) -> int:
    """Return the number of jobs that keep the CPUs busy.

    While one of them computes, the others wait for the network or the database.
    """
    return max(1, round(cpus * alone.p50_ms / alone.cpu_ms_per_job))


def advise(points: Sequence[Point], cpus: int, jobs_per_second: float) -> str:
    """Return the settings to use, the reason, and the workers for a rate, as text."""
    best = best_point(points)
    fastest = max(points, key=lambda point: point.jobs_per_second)
    alone = min(points, key=lambda point: (point.concurrency, point.processes))
    slowest = max(points, key=lambda point: point.p50_ms)
    workers = math.ceil(jobs_per_second / (best.jobs_per_second * PLANNED))
    fewest = "these are the fewest processes, then the fewest jobs at once,"
    lines = [
        f"Best: {_settings(best)}, with {best.jobs_per_second:.1f} jobs/s, "
        f"p50 {best.p50_ms:.0f} ms, p95 {best.p95_ms:.0f} ms and {best.memory_mb:.0f} MB.",
        f"Why: {fewest} that reach {ENOUGH * 100:.0f} % of the highest rate, "
        f"{fastest.jobs_per_second:.1f} jobs/s.",
        f"A job alone takes {alone.p50_ms:.0f} ms, of which {alone.cpu_ms_per_job:.0f} ms are "
        f"CPU: about {balanced_concurrency(alone, cpus)} at once keep {cpus} CPUs busy.",
        f"More only wait in the worker: a job takes {slowest.p50_ms:.0f} ms with "
        f"{_settings(slowest)}.",
        f"For {jobs_per_second:g} jobs/s: {workers} such workers on {cpus} CPUs each, planned "
        f"with {PLANNED * 100:.0f} % of their rate.",
    ]
    return "\n".join(lines)


def _settings(point: Point) -> str:
    return f"JOB_PROCESSES={point.processes} JOB_CONCURRENCY={point.concurrency}"
