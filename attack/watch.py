"""A running service observed from outside: workers, their memory, their counts."""

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import psutil
from tests.service_process import Service

Sample = TypeVar("Sample")


def workers(service: Service) -> set[int]:
    """Return the PIDs of the running workers, as in the metrics."""
    pids = re.findall(r'worker_resident_memory_bytes{pid="(\d+)"}', service.metrics())
    return set(map(int, pids))


def counted(service: Service, labels: str = "") -> int:
    """Return the number of requests in the metrics; `labels` is a regular expression."""
    # A named group, since `labels` may contain groups too.
    pattern = r"^http_server_request_duration_seconds_count{.*" + labels + r".*} (?P<value>.+)$"
    found = re.finditer(pattern, service.metrics(), re.MULTILINE)
    return round(sum(float(match["value"]) for match in found))


def resident_bytes(pids: set[int]) -> dict[int, int]:
    """Return the memory of each of these processes that still exists."""
    found = {}
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            found[pid] = psutil.Process(pid).memory_info().rss
    return found


@contextlib.contextmanager
def every(seconds: float, measure: Callable[[], Sample]) -> Iterator[list[Sample]]:
    """Collect samples: one before the block, then one per period during the block."""
    samples = [measure()]
    stop = threading.Event()

    def collect() -> None:
        while not stop.wait(seconds):
            samples.append(measure())

    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(collect)
        try:
            yield samples
        finally:
            stop.set()
            running.result()
