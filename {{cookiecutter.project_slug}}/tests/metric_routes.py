"""The service with metrics at module level, of every type and mode, and routes that change them."""

import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from prometheus_client import Counter, Gauge, Histogram, Summary

from app.main import create_app
from app.settings import load_settings

MODES: tuple[Any, ...] = ("all", "min", "max", "sum", "mostrecent")
LIVE_MODES: tuple[Any, ...] = tuple(f"live{mode}" for mode in MODES)

app = create_app(load_settings())

# Only declared at import
ORDERS = Counter("orders", "Orders.")
SIZES = Histogram("sizes", "Sizes.", ["kind"], buckets=[1, 10])
TIMES = Summary("times", "Times.")
GAUGES = [Gauge(f"gauge_{mode}", "", multiprocess_mode=mode) for mode in MODES + LIVE_MODES]
LABELS = Counter("labels", "By text.", ["text"])

# With a value at import
IMPORTS = Counter("imports", "Imports.")
IMPORTS.inc(5)
for each in MODES + LIVE_MODES:
    Gauge(f"imported_{each}", "", multiprocess_mode=each).set(7)

pools: list[ProcessPoolExecutor] = []


@app.get("/update")
async def update(value: float) -> int:
    """Change every metric, and return the pid."""
    ORDERS.inc()
    SIZES.labels("small").observe(value)
    TIMES.observe(value)
    for gauge in GAUGES:
        gauge.set(value)
    return os.getpid()


@app.get("/label")
async def label(text: str) -> int:
    """Count a request by a label, and return the pid."""
    LABELS.labels(text).inc()
    return os.getpid()


@app.get("/fork")
async def fork() -> int:
    """Fork a child that changes metrics and then waits. Return its pid; never wait for it."""
    pid = os.fork()
    if pid == 0:
        change_as_child()
        signal.pause()
    return pid


@app.get("/pool")
def pool() -> int:
    """Change metrics in the child of a process pool, which waits then. Return its pid."""
    executor = ProcessPoolExecutor(1)
    pools.append(executor)
    return executor.submit(change_as_child).result()


def change_as_child() -> int:
    """Count an order, and set every gauge to a value that no worker sets. Return the pid."""
    ORDERS.inc()
    for gauge in GAUGES:
        gauge.set(-1)
    return os.getpid()


@app.get("/block")
async def block(seconds: float) -> None:
    """Compute in the event loop, which can do nothing else for `seconds` of CPU time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
