"""Metrics of one process: its event loop, connections, dependencies, CPU and memory."""

import asyncio
import os
import resource
import sys
import time
from bisect import bisect_left
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from redis.asyncio import ConnectionPool

from app.telemetry.metric_files import retry_writes

POOL = "db_client_connection_pool_name"
STATE = "db_client_connection_state"
DEPENDENCIES = ("postgres", "redis")
UPDATE_SECONDS = 1.0
#: Measurements of the event loop's delay in this time. Any block that is longer than the pause
#: between two is seen. Each wakes an idle process, which costs 0.1 ms.
TICKS = 10
IDLE_TICKS = 5
#: A process that computes for less than this in `UPDATE_SECONDS` is idle.
IDLE_CPU_SECONDS = 0.02
#: Seconds: a millisecond is nothing, a tenth of a second is felt.
DELAY_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Sized(Protocol):
    """A pool, as far as its number of connections is concerned."""

    def get_size(self) -> int:
        """Return the number of connections."""

    def get_idle_size(self) -> int:
        """Return the number of connections that are not lent."""

    def get_max_size(self) -> int:
        """Return the greatest number of connections."""


class Waiting(Protocol):
    """A database, as far as its callers' wait for a connection is concerned."""

    #: Callers that are waiting for a connection now.
    pending: int
    #: Callers that did not get one in time, so far.
    acquire_timeouts: int

    @property
    def pool(self) -> Sized:
        """The pool of its connections."""


def dropped_log_lines(registry: CollectorRegistry) -> Counter:
    """Return the counter `log_dropped_lines_total`, for `LOG_LINES.take_dropped()`."""
    text = "Log lines other than access lines, dropped because stdout did not accept them."
    return Counter("log_dropped_lines", text, registry=registry)


class ProcessMetrics:
    """The metrics of one process: delay of its event loop, its pools and dependencies."""

    def __init__(self, registry: CollectorRegistry, required: Collection[str]) -> None:
        """`required`: the dependencies without which the process is not ready."""
        self.registry = registry
        #: The values that were written last: each write is a system call.
        self.written: dict[Gauge, float] = {}
        self.process_seconds = time.process_time()
        text = "Delay of the event loop: the time for which a timer that is due waits."
        self.delay = Histogram(
            "worker_event_loop_delay_seconds", text, buckets=DELAY_BUCKETS, registry=registry
        )
        text = "Connections, idle or used."
        self.connections = self.gauge("db_client_connection_count", text, POOL, STATE)
        text = "Maximum number of connections of a pool."
        self.max_connections = self.gauge("db_client_connection_max", text, POOL)
        text = "Callers that are waiting for a connection."
        self.pending = self.gauge("db_client_connection_pending_requests", text, POOL)
        name = "db_client_connection_timeouts"
        text = "Callers that did not get a connection in time."
        self.timeouts = Counter(name, text, [POOL], registry=registry).labels("postgres")
        self.counted_timeouts = 0
        text = "1 if the dependency responds, to all workers."
        self.up = self.gauge("dependency_up", text, "dependency", mode="livemin")
        text = "1 if the process is not ready without the dependency."
        gauge = self.gauge("dependency_required", text, "dependency", mode="livemax")
        for dependency in {*DEPENDENCIES, *required}:
            gauge.labels(dependency).set(dependency in required)

    def gauge(self, name: str, text: str, *labels: str, mode: Any = "livesum") -> Gauge:
        """Return a new gauge, by default the sum over the workers that run."""
        return Gauge(name, text, labels, registry=self.registry, multiprocess_mode=mode)

    async def update_periodically(
        self, database: Waiting, redis: ConnectionPool | None, replica: Waiting | None = None
    ) -> None:
        """Update the gauges every `UPDATE_SECONDS`, until cancelled."""
        while True:
            self.update(database, redis)
            if replica is not None:
                self._set_sizes("replica", replica.pool)
            retry_writes()
            ticks = IDLE_TICKS if self._is_idle() else TICKS
            pause = UPDATE_SECONDS / ticks
            observe_all(self.delay, await _measure_delays(pause, ticks))

    def _is_idle(self) -> bool:
        """Return whether this process has computed little since the last call."""
        before = self.process_seconds
        self.process_seconds = time.process_time()
        return self.process_seconds - before < IDLE_CPU_SECONDS

    def update(self, database: Waiting, redis: ConnectionPool | None) -> None:
        """Read the state of the pools."""
        self._set_sizes("postgres", database.pool)
        if redis is not None:
            (idle, _), (used, _) = redis.get_connection_count()
            self._set_pool("redis", idle, used, redis.max_connections)
        self.set(self.pending.labels("postgres"), database.pending)
        if database.acquire_timeouts > self.counted_timeouts:
            self.timeouts.inc(database.acquire_timeouts - self.counted_timeouts)
            self.counted_timeouts = database.acquire_timeouts

    def _set_sizes(self, name: str, pool: Sized) -> None:
        idle = pool.get_idle_size()
        self._set_pool(name, idle, pool.get_size() - idle, pool.get_max_size())

    def _set_pool(self, name: str, idle: int, used: int, maximum: int) -> None:
        self.set(self.connections.labels(name, "idle"), idle)
        self.set(self.connections.labels(name, "used"), used)
        self.set(self.max_connections.labels(name), maximum)

    def set(self, gauge: Gauge, value: float) -> None:
        """Set a gauge if its value has changed."""
        if self.written.get(gauge) != value:
            self.written[gauge] = value
            gauge.set(value)


async def _measure_delays(seconds: float, number: int) -> list[float]:
    """Return for how long each of several timers waits after it is due, one after the other.

    Each is a callback: a task that sleeps costs 50 us more each time.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    delays: list[float] = []

    def start() -> None:
        # By this clock, since uvloop's counts milliseconds.
        loop.call_later(seconds, end, time.perf_counter() + seconds)

    def end(due: float) -> None:
        delays.append(max(time.perf_counter() - due, 0))
        if len(delays) < number:
            start()
        elif not done.done():
            done.set_result(None)

    start()
    await done
    return delays


def observe_all(histogram: Histogram, values: Sequence[float]) -> None:
    """Observe values, with one write for each bucket: no public method observes many at once."""
    histogram._sum.inc(sum(values))
    buckets = [bisect_left(histogram._upper_bounds, value) for value in values]
    for bucket in set(buckets):
        histogram._buckets[bucket].inc(buckets.count(bucket))


class WorkerMetrics(ProcessMetrics):
    """The metrics of one worker, in a registry of its own.

    A process that makes several applications, such as a test run, makes them several times.
    """

    def __init__(self, required: Collection[str]) -> None:
        super().__init__(CollectorRegistry(), required)
        self.gauge("worker_processes", "Workers that are serving.").set(1)
        text = "Resident memory of each worker."
        self.memory = self.gauge("worker_resident_memory_bytes", text, mode="liveall")
        text = "CPU time of the workers."
        cpu = Counter("process_cpu_time_seconds", text, ["cpu_mode"], registry=self.registry)
        self.cpu = (cpu.labels("user"), cpu.labels("system"))
        self.cpu_seconds = os.times()[:2]

    def update(self, database: Waiting, redis: ConnectionPool | None) -> None:
        """Read the CPU time and the memory of this process, and the state of its pools."""
        super().update(database, redis)
        self.set(self.memory, _resident_bytes())
        # Without that of child processes
        now = os.times()[:2]
        for counter, before, seconds in zip(self.cpu, self.cpu_seconds, now, strict=True):
            counter.inc(max(seconds - before, 0))
        self.cpu_seconds = now


def _resident_bytes() -> int:
    """Return the memory of this process now; without /proc, its maximum so far."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()
    except OSError:
        unit_bytes = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes
