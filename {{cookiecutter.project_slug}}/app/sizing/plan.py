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
#: The same for the read replica, if there is one: one for reads, and one for its check.
MIN_REPLICA_CONNECTIONS = 2
#: Default number of connections of a worker. With 7 for requests, 16 clients do not wait for each
#: other: 35 % more throughput than with 3, at a fifth of the p99 (docs/tuning.md).
DEFAULT_CONNECTIONS = 8
#: Three connections that Postgres reserves for its superuser, two of the migration.
OTHER_CONNECTIONS = 5
#: An upper bound for each value of a label set in the files of metrics: the sum, and one for each
#: bucket. With a route of 40 characters they use 295 bytes on average.
METRIC_VALUE_BYTES = 300
#: Files of metrics as large as a worker's: those of a worker that has exited, and their archive.
EXITED_WORKERS = 2
#: The pods during the rollout of a release of one pod, the surge included.
MIN_PODS = 3


class Plan(NamedTuple):
    """The workers of this pod, the Postgres connections of each, and the reasons."""

    workers: int
    connections_per_pod: int
    connections_per_worker: int
    #: Those of `connections_per_worker` that lead to the read replica.
    replica_connections: int
    explanation: str

    @property
    def primary_connections(self) -> int:
        """The connections of a worker that lead to the primary."""
        return self.connections_per_worker - self.replica_connections


def plan_workers(settings: Settings, resources: Resources) -> Plan:
    """Return the plan for these resources.

    `WEB_CONCURRENCY` decides if it is set. Otherwise there is one worker per CPU, limited by memory
    and by `MAX_WORKERS`, and at least one.

    One async worker keeps one CPU busy; the popular 2 x CPU + 1 is for sync workers. Measured on 2
    CPUs with Postgres: 2 workers have 1.36 times the throughput of one, 5 workers 1.17 times. Under
    a quota of one CPU, p99 grows fourfold.
    """
    workers, explanation = _choose_workers(settings, resources)
    per_pod = pod_connections(settings, workers)
    of_replica = replica_connections(settings, workers) // workers
    minimum = MIN_CONNECTIONS
    if settings.has_replica:
        minimum += MIN_REPLICA_CONNECTIONS
        of_replica = max(MIN_REPLICA_CONNECTIONS, of_replica)
    per_worker = max(minimum, per_pod // workers)
    of_replica = min(of_replica, per_worker - MIN_CONNECTIONS)
    return Plan(workers, per_pod, per_worker, of_replica, explanation)


def pod_connections(settings: Settings, workers: int) -> int:
    """Return `DATABASE_MAX_CONNECTIONS`, by default 8 for each worker.

    The default leaves room for the rollout of one pod in `POSTGRES_MAX_CONNECTIONS`.
    """
    if settings.database_max_connections:
        return settings.database_max_connections
    available = (settings.postgres_max_connections - OTHER_CONNECTIONS) // MIN_PODS
    return max(MIN_CONNECTIONS, min(DEFAULT_CONNECTIONS * workers, available))


def replica_connections(settings: Settings, workers: int) -> int:
    """Return the read replica's share of the pod's connections: by default half, or none.

    A share of the same number, since both pools lead to one server after a promotion.
    """
    if not settings.has_replica:
        return 0
    default = pod_connections(settings, workers) // 2
    return settings.database_replica_max_connections or default


def metrics_bytes(settings: Settings, workers: int) -> int:
    """Return the bytes of /dev/shm that the metrics of requests use at most."""
    values = len(settings.metrics_buckets) + 2
    per_worker = settings.metrics_max_label_sets * values * METRIC_VALUE_BYTES
    return (workers + EXITED_WORKERS) * per_worker


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
