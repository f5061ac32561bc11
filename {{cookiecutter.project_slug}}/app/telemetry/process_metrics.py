"""What a process says of itself: that it lives, its memory, its connections, and who answers it."""

import resource
import sys
from pathlib import Path
from typing import Any

from asyncpg import Pool
from prometheus_client import CollectorRegistry, Gauge
from redis.asyncio import ConnectionPool


class WorkerMetrics:
    """What a worker says of itself: that it lives, its memory, its connections, and who answers it."""

    def __init__(self) -> None:
        registry = CollectorRegistry()

        def gauge(
            name: str, text: str, labels: tuple[str, ...] = (), mode: Any = "livesum"
        ) -> Gauge:
            return Gauge(name, text, labels, registry=registry, multiprocess_mode=mode)

        pool, state = "db_client_connection_pool_name", "db_client_connection_state"
        gauge("worker_processes", "Workers that serve.").set(1)
        self.memory = gauge(
            "worker_resident_memory_bytes", "Resident memory of each worker.", mode="liveall"
        )
        self.up = gauge("dependency_up", "1 if it answers all workers.", ("dependency",), "livemin")
        self.connections = gauge(
            "db_client_connection_count", "Connections, idle or used.", (pool, state)
        )
        self.most_connections = gauge(
            "db_client_connection_max", "Connections that a pool may have.", (pool,)
        )

    def update(self, postgres: Pool, redis: ConnectionPool) -> None:
        """Look at this process and at its pools."""
        self.memory.set(_resident_bytes())
        (redis_idle, _), (redis_used, _) = redis.get_connection_count()
        idle = postgres.get_idle_size()
        for name, state, count in (
            ("postgres", "idle", idle),
            ("postgres", "used", postgres.get_size() - idle),
            ("redis", "idle", redis_idle),
            ("redis", "used", redis_used),
        ):
            self.connections.labels(name, state).set(count)
        self.most_connections.labels("postgres").set(postgres.get_max_size())
        self.most_connections.labels("redis").set(redis.max_connections)


def _resident_bytes() -> int:
    """Return the memory of this process now; where there is no /proc, the most that it ever had."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
