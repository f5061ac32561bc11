"""The number of workers and connections of a pod, with the reasons."""

import math
from typing import NamedTuple

from app.settings import Settings
from app.sizing.resources import Resources

#: Share of the memory limit that is planned; the rest is for peaks.
USABLE_MEMORY = 0.8
#: Memory of the gunicorn master and the metrics process.
BASE_MEMORY_MB = 80
#: Added before rounding down: a quota of 1.75 CPUs gets two workers, one of 1.5 gets one.
ROUNDING = 0.25
#: Minimum number of connections of a worker: one for requests, one for the readiness probe.
MIN_CONNECTIONS = 2


class Plan(NamedTuple):
    """The workers of this pod, the Postgres connections of each, and the reasons."""

    workers: int
    connections_per_worker: int
    explanation: str


def plan_workers(settings: Settings, resources: Resources) -> Plan:
    """Return the plan for these resources.

    `WEB_CONCURRENCY` decides if it is set. Otherwise there is one worker per CPU, limited by memory
    and by `MAX_WORKERS`, and at least one.

    One async worker keeps one CPU busy; the popular 2 x CPU + 1 is for sync workers. Measured on 2
    CPUs with Postgres: 2 workers have 1.36 times the throughput of one, 5 workers 1.17 times. Under
    a quota of one CPU, p99 grows fourfold.
    """
    workers, explanation = _choose_workers(settings, resources)
    connections = max(MIN_CONNECTIONS, settings.database_max_connections // workers)
    return Plan(workers, connections, explanation)


def workers_by_memory(settings: Settings, resources: Resources) -> int:
    """Return how many workers fit into the memory, at least 1."""
    usable_mb = resources.megabytes * USABLE_MEMORY - BASE_MEMORY_MB
    return max(1, int(usable_mb // settings.worker_memory_mb))


def _choose_workers(settings: Settings, resources: Resources) -> tuple[int, str]:
    """Return the number of workers, and the terms that decided it."""
    if settings.web_concurrency:
        return settings.web_concurrency, f"WEB_CONCURRENCY={settings.web_concurrency}"

    per_core = settings.workers_per_core
    workers = max(1, math.floor(resources.cpus * per_core + ROUNDING))
    cpus = f"{resources.cpus:g} CPUs ({resources.cpu_source})"
    terms = [f"{cpus} x WORKERS_PER_CORE={per_core:g}"]

    by_memory = workers_by_memory(settings, resources)
    if by_memory < workers:
        workers = by_memory
        terms.append(f"{resources.megabytes} MB ({resources.memory_source}) allow {by_memory}")

    if settings.max_workers and settings.max_workers < workers:
        workers = settings.max_workers
        terms.append(f"MAX_WORKERS={workers}")

    return workers, "; ".join(terms)
