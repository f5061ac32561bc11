"""Metrics of one process: memory, connection pools, state of its dependencies."""

import asyncio
import resource
import sys
from pathlib import Path
from typing import Any

from asyncpg import Pool
from prometheus_client import CollectorRegistry, Counter, Gauge
from redis.asyncio import ConnectionPool

from app.telemetry.metric_files import retry_writes

POOL = "db_client_connection_pool_name"
STATE = "db_client_connection_state"
UPDATE_SECONDS = 1.0


def dependency_gauge(registry: CollectorRegistry) -> Gauge:
    """Return the gauge `dependency_up`, by `dependency`."""
    text = "1 if the dependency responds, to all workers."
    labels = ["dependency"]
    return Gauge("dependency_up", text, labels, registry=registry, multiprocess_mode="livemin")


def dropped_log_lines(registry: CollectorRegistry) -> Counter:
    """Return the counter `log_dropped_lines_total`, for `LOG_LINES.take_dropped()`."""
    text = "Log lines other than access lines, dropped because stdout did not accept them."
    return Counter("log_dropped_lines", text, registry=registry)


class WorkerMetrics:
    """The gauges of one worker, in a registry of its own.

    A process that makes several applications, such as a test run, makes them several times.
    """

    def __init__(self, postgres: Pool, redis: ConnectionPool) -> None:
        self.postgres = postgres
        self.redis = redis
        registry = CollectorRegistry()

        def gauge(name: str, text: str, *labels: str, mode: Any = "livesum") -> Gauge:
            return Gauge(name, text, labels, registry=registry, multiprocess_mode=mode)

        gauge("worker_processes", "Workers that are serving.").set(1)
        text = "Resident memory of each worker."
        self.memory = gauge("worker_resident_memory_bytes", text, mode="liveall")
        text = "Connections, idle or used."
        self.connections = gauge("db_client_connection_count", text, POOL, STATE)
        text = "Maximum number of connections of a pool."
        self.max_connections = gauge("db_client_connection_max", text, POOL)
        self.up = dependency_gauge(registry)

    async def update_periodically(self) -> None:
        """Update the gauges every `UPDATE_SECONDS`, until cancelled."""
        while True:
            self.update()
            retry_writes()
            await asyncio.sleep(UPDATE_SECONDS)

    def update(self) -> None:
        """Read the memory of this process and the state of its pools."""
        self.memory.set(_resident_bytes())
        (redis_idle, _), (redis_used, _) = self.redis.get_connection_count()
        postgres_idle = self.postgres.get_idle_size()
        for pool, state, count in (
            ("postgres", "idle", postgres_idle),
            ("postgres", "used", self.postgres.get_size() - postgres_idle),
            ("redis", "idle", redis_idle),
            ("redis", "used", redis_used),
        ):
            self.connections.labels(pool, state).set(count)
        self.max_connections.labels("postgres").set(self.postgres.get_max_size())
        self.max_connections.labels("redis").set(self.redis.max_connections)


def _resident_bytes() -> int:
    """Return the memory of this process now; without /proc, its maximum so far."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()
    except OSError:
        unit_bytes = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes
