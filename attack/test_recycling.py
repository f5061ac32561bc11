"""The workers of one instance are replaced in every possible way, under load."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from tests.service_process import Service, eventually, serving

from load import MIXED, Result, load
from watch import counted, every, workers

ROUNDS = 3
OF_LOAD = r'http_route="(/|/payments|/slow)"'


@dataclass(frozen=True)
class Outcome:
    """The outcome of an attack: of the load, of the metrics and of the log."""

    result: Result
    count: int
    levels: set[str]


def bear(attack: Callable[[Service], None], **settings: str) -> Outcome:
    """Run mixed load on two workers during an attack; return the outcome.

    The count in the metrics must never decrease.
    """
    with serving("tests.fault_routes:app", **settings) as service:
        service.wait()
        eventually(lambda: len(workers(service)) == 2)
        with (
            every(0.5, lambda: counted(service, OF_LOAD)) as counts,
            load(service.port, MIXED) as result,
        ):
            time.sleep(1)
            attack(service)

        def are_all_counted() -> bool:
            counts.append(counted(service, OF_LOAD))
            return counts[-1] >= result.total

        # A worker flushes its counts a moment later; a killed one never does.
        with contextlib.suppress(AssertionError):
            eventually(are_all_counted, 5)
        print(f"{result}; {counts[-1]} counted")
        assert all(before <= after for before, after in pairwise(counts)), counts
        assert service.stop() == 0
        return Outcome(result, counts[-1], {line["level"] for line in service.lines})


def assert_nothing_lost(outcome: Outcome) -> None:
    """Assert that no request failed, all were counted, and the log has no warning."""
    assert outcome.result.failures == [], str(outcome.result)
    assert outcome.count == outcome.result.total
    assert outcome.levels == {"info"}


def wait_until_replaced(service: Service, old: set[int]) -> None:
    """Wait until two workers run, and none of the old ones."""

    def are_new() -> bool:
        now = workers(service)
        return len(now) == 2 and not now & old

    eventually(are_new)


def test_sighup_loses_no_request_and_no_count(urls: dict[str, str]) -> None:
    def hang_up(service: Service) -> None:
        for _ in range(ROUNDS):
            old = workers(service)
            service.process.send_signal(signal.SIGHUP)
            wait_until_replaced(service, old)

    assert_nothing_lost(bear(hang_up, **urls))


def test_sigterm_to_one_worker_loses_no_request_and_no_count(urls: dict[str, str]) -> None:
    def terminate_one(service: Service) -> None:
        for _ in range(ROUNDS):
            victim = min(workers(service))
            os.kill(victim, signal.SIGTERM)
            wait_until_replaced(service, {victim})

    assert_nothing_lost(bear(terminate_one, **urls))


def test_max_requests_loses_no_request_and_no_count(urls: dict[str, str]) -> None:
    """Workers are recycled after 500 requests, until twelve of them have been seen."""

    def wait_for_many_workers(service: Service) -> None:
        seen: set[int] = set()

        def are_many() -> bool:
            seen.update(workers(service))
            return len(seen) >= 12

        eventually(are_many, 60)

    recycling = {"MAX_REQUESTS": "500", "MAX_REQUESTS_JITTER": "0"}
    assert_nothing_lost(bear(wait_for_many_workers, **recycling, **urls))


def test_sigkill_of_one_worker_loses_only_its_last_counts(urls: dict[str, str]) -> None:
    """At most the counts of 0.3 s are lost: three flush intervals of both workers."""
    seconds: list[float] = []

    def kill(service: Service) -> None:
        begin = time.monotonic()
        # Until then, there is much to lose.
        time.sleep(3)
        victim = min(workers(service))
        os.kill(victim, signal.SIGKILL)
        wait_until_replaced(service, {victim})
        # bear() runs the load for one second before.
        seconds.append(1 + time.monotonic() - begin)

    outcome = bear(kill, **urls)
    allowed = 0.3 * outcome.result.total / seconds[0]
    lost = outcome.result.responses.total() - outcome.count
    assert -len(outcome.result.failures) <= lost <= allowed, f"{lost} lost"
