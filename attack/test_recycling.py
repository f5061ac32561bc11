"""The workers of one instance are replaced in every way there is, under load on their sockets."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from itertools import pairwise

from tests.service_process import Service, eventually, serving

from load import MIXED, Result, load
from watch import counted, every, workers

OF_LOAD = r'http_route="(/|/payments|/slow)"'


def bear(attack: Callable[[Service], None], **settings: str) -> tuple[Result, int, set[str]]:
    """Return what became of mixed load on two workers during an attack, how much was counted, and the log's levels."""
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

        with contextlib.suppress(
            AssertionError
        ):  # a worker hands over a moment later, and one that was killed never
            eventually(are_all_counted, 5)
        print(f"{result}; {counts[-1]} counted")
        assert all(before <= after for before, after in pairwise(counts)), counts
        assert service.stop() == 0
        return result, counts[-1], {line["level"] for line in service.lines}


def until_replaced(service: Service, old: set[int]) -> None:
    """Wait until there are two workers, and none of the old ones."""

    def are_new() -> bool:
        now = workers(service)
        return len(now) == 2 and not now & old

    eventually(are_new)


def test_hangups_lose_no_request_and_no_count(urls: dict[str, str]) -> None:
    def hang_up(service: Service) -> None:
        for _ in range(3):
            old = workers(service)
            service.process.send_signal(signal.SIGHUP)
            until_replaced(service, old)

    result, count, levels = bear(hang_up, **urls)
    assert result.failures == [], str(result)
    assert (count, levels) == (result.total, {"info"})


def test_a_term_to_one_worker_loses_no_request_and_no_count(urls: dict[str, str]) -> None:
    def end_one(service: Service) -> None:
        for _ in range(3):
            victim = min(workers(service))
            os.kill(victim, signal.SIGTERM)
            until_replaced(service, {victim})

    result, count, levels = bear(end_one, **urls)
    assert result.failures == [], str(result)
    assert (count, levels) == (result.total, {"info"})


def test_recycling_after_500_requests_loses_no_request_and_no_count(urls: dict[str, str]) -> None:
    def go_on(service: Service) -> None:
        seen: set[int] = set()

        def are_many() -> bool:
            seen.update(workers(service))
            return len(seen) >= 12

        eventually(are_many, 60)

    result, count, levels = bear(go_on, MAX_REQUESTS="500", MAX_REQUESTS_JITTER="0", **urls)
    assert result.failures == [], str(result)
    assert (count, levels) == (result.total, {"info"})


def test_a_killed_worker_takes_only_its_last_moment_of_counts_along(urls: dict[str, str]) -> None:
    seconds: list[float] = []

    def kill(service: Service) -> None:
        start = time.monotonic()
        time.sleep(3)  # so that there is much to lose
        victim = min(workers(service))
        os.kill(victim, signal.SIGKILL)
        until_replaced(service, {victim})
        seconds.append(1 + time.monotonic() - start)

    result, count, _ = bear(kill, **urls)
    a_moment = 0.3 * result.total / seconds[0]  # requests of three times the fold, of both workers
    lost = result.answered.total() - count
    assert -len(result.failures) <= lost <= a_moment, f"{lost} lost"
