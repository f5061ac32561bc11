"""What a test can see of a running service from outside: its workers, their memory, what they have counted."""

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import psutil
from tests.service_process import Service

Seen = TypeVar("Seen")


def workers(service: Service) -> set[int]:
    """Return the pids of the workers that serve, as the metrics name them."""
    return set(
        map(int, re.findall(r'worker_resident_memory_bytes{pid="(\d+)"}', service.metrics()))
    )


def counted(service: Service, labels: str = "") -> int:
    """Return how many requests were answered, as the metrics say; `labels` is a regular expression."""
    pattern = r"^http_server_request_duration_seconds_count{.*" + labels + r".*} (?P<value>.+)$"
    return round(
        sum(
            float(found["value"]) for found in re.finditer(pattern, service.metrics(), re.MULTILINE)
        )
    )


def resident_bytes(pids: set[int]) -> dict[int, int]:
    """Return the memory of each of these processes that is still there."""
    found = {}
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            found[pid] = psutil.Process(pid).memory_info().rss
    return found


@contextlib.contextmanager
def every(seconds: float, look: Callable[[], Seen]) -> Iterator[list[Seen]]:
    """Collect what `look` returns, once before the block, then again and again beside it."""
    seen, stop = [look()], threading.Event()

    def go_on() -> None:
        while not stop.wait(seconds):
            seen.append(look())

    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(go_on)
        try:
            yield seen
        finally:
            stop.set()
            running.result()
