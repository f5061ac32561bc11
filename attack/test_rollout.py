"""The rendered production overlay is obeyed by a cluster of its own, while everybody goes on asking."""

import asyncio
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import asyncpg
import pytest
from scripts.dev_services import Redis
from tests.service_process import eventually

from cluster import LAG_SECONDS, START_SECONDS, Cluster, running
from load import TIMEOUT_SECONDS, Kind, Result, get, load, post
from manifest import Manifest, read

REQUESTS = 10_000  # over connections of each kind, at least
UPDATE_SECONDS = 120.0
PATIENCE_SECONDS = 2.0  # of the clients of a pod that is frozen
SLACK_SECONDS = 2.0  # the machine has much to do
NOBODY = {
    "database_url": "postgresql://app@127.0.0.1:1/postgres",
    "redis_url": "redis://127.0.0.1:1/0",
}


def clients(number: int, reference: str, timeout_seconds: float = TIMEOUT_SECONDS) -> list[Kind]:
    """Return clients of each kind, `number` of each, whose payments carry a reference."""
    payment = {"amount": 1250, "currency": "EUR", "reference": reference}
    kinds = [
        kind
        for name, keeps_alive in (("keep-alive", True), ("new connection", False))
        for kind in (
            get("/", f"GET, {name}", keeps_alive=keeps_alive, pause=0.05),
            post("/payments", payment, f"POST, {name}", keeps_alive=keeps_alive, pause=0.05),
        )
    ]
    return number * [replace(kind, timeout_seconds=timeout_seconds) for kind in kinds]


def fewest(result: Result) -> int:
    """Return how many requests were answered over connections of the kind that had fewer."""
    kinds = ("keep-alive", "new connection")
    return min(
        sum(n for (name, _), n in result.answered.items() if name.endswith(kind)) for kind in kinds
    )


def report(cluster: Cluster, result: Result) -> None:
    """Print what happened when, failed requests among it."""
    failures = [
        (
            each.begin,
            f"{each.kind} to {each.host}: {each.reason} after {each.end - each.begin:.3f} s",
        )
        for each in result.failures[:50]
    ]
    events = sorted(cluster.events + failures)
    print(result, *(f"{at - events[0][0]:8.3f} {text}" for at, text in events), sep="\n")


def stored(url: str, reference: str) -> int:
    """Return how many payments with this reference are in the database."""

    async def count() -> int:
        connection = await asyncpg.connect(url)
        try:
            return int(
                await connection.fetchval(
                    "select count(*) from payments where reference = $1", reference
                )
            )
        finally:
            await connection.close()

    return asyncio.run(count())


@pytest.fixture(scope="module")
def prod(database_url: str, redis: Redis) -> Manifest:
    if sys.platform != "linux":
        pytest.skip(
            "a pod has an address of its own in 127.0.0.0/8: only Linux has them all without set-up"
        )
    return read("prod", {"database_url": database_url, "redis_url": redis.url})


class Freeze:
    """A pod is frozen under load until it has been restarted: 43 s until it counts as dead, and 60 of grace."""

    def __init__(self, prod: Manifest) -> None:
        self.prod, self.is_given_up = prod, False

    def run(self) -> None:
        """Take two minutes."""
        longest = self.prod.liveness.notices_within + self.prod.grace + START_SECONDS
        kinds = clients(3, "freeze", PATIENCE_SECONDS)
        with running(self.prod) as self.cluster, load(self.cluster.pick, kinds) as self.result:
            time.sleep(1)
            self.pod, self.begin = self.cluster.pods[0], time.monotonic()
            self.cluster.tell(f"{self.pod.address} is frozen")
            self.pod.signal(signal.SIGSTOP)
            eventually(lambda: self.is_given_up or (self.pod.exits and self.pod.is_ready), longest)
            time.sleep(LAG_SECONDS + 1)
            assert [pod.exits for pod in self.cluster.pods] == [[-signal.SIGKILL], [], []]


@pytest.fixture(scope="module", autouse=True)
def frozen(prod: Manifest) -> Iterator["tuple[Freeze, Future[None]]"]:
    """What freezing a pod leads to; its two minutes pass beside the other tests."""
    with ThreadPoolExecutor(1) as thread:
        freeze = Freeze(prod)
        yield freeze, thread.submit(freeze.run)
        freeze.is_given_up = True


def test_a_rolling_update_loses_no_request(prod: Manifest, database_url: str) -> None:
    with running(prod) as cluster:
        with load(cluster.pick, clients(6, "update")) as result:
            updates = 0
            while not updates or fewest(result) < REQUESTS:
                updates += 1
                cluster.update(prod.but(SERVICE_VERSION=str(updates)))
                eventually(lambda: cluster.is_settled, UPDATE_SECONDS)
        report(cluster, result)
        assert result.failures == []
        assert stored(database_url, "update") == sum(
            n for (_, status), n in result.answered.items() if status == 201
        )
        ended = cluster.pods[: -prod.replicas]
        assert [pod.exits for pod in ended] == [[0]] * prod.replicas * updates
        assert {json.loads(line)["level"] for pod in ended for line in pod.text.splitlines()} == {
            "info"
        }


def test_without_the_drain_the_same_update_loses_some(prod: Manifest) -> None:
    with running(prod.but(DRAIN_SECONDS="0")) as cluster:
        with load(cluster.pick, clients(6, "no drain")) as result:
            cluster.update(prod)
            eventually(lambda: result.failures or cluster.is_settled, UPDATE_SECONDS)
        report(cluster, result)
        assert result.failures


def test_a_release_that_never_becomes_ready_stops_at_one_pod_and_its_undo_loses_no_request(
    prod: Manifest,
) -> None:
    deadline = 20  # the manifest's 300 would be too long here
    with running(prod) as cluster:
        before = cluster.live
        with load(cluster.pick, clients(3, "undo")) as result:
            cluster.update(replace(read("prod", NOBODY), progress_deadline=deadline))
            eventually(lambda: cluster.has_exceeded_its_deadline, UPDATE_SECONDS)
            *others, broken = cluster.live
            assert others == before
            cluster.undo()
            eventually(lambda: cluster.is_settled, UPDATE_SECONDS)
        report(cluster, result)
        assert result.failures == []
        assert cluster.live == before
        assert broken.exits == [0]  # and no earlier end: liveness asks no dependency
        assert broken.ready_at == math.inf


def test_a_node_drain_waits_for_the_budget_and_loses_no_request(prod: Manifest) -> None:
    with running(prod) as cluster:
        first, *others = cluster.live
        with load(cluster.pick, clients(3, "node drain")) as result:
            assert cluster.evict(first)
            while others:
                assert not any([cluster.evict(pod) for pod in others])  # noqa: C419 - ask for all
                pod = others.pop()
                eventually(partial(cluster.evict, pod))
            eventually(lambda: cluster.is_settled, UPDATE_SECONDS)
        report(cluster, result)
        assert result.failures == []
        assert [pod.exits for pod in cluster.pods] == [[0]] * prod.replicas + [[]] * prod.replicas


def test_a_frozen_pod_costs_no_more_than_its_probes_promise(
    frozen: "tuple[Freeze, Future[None]]",
) -> None:
    freeze, future = frozen
    future.result()
    report(freeze.cluster, freeze.result)
    failures, promised = freeze.result.failures, freeze.prod.readiness.notices_within + LAG_SECONDS
    last = max(failure.begin for failure in failures) - freeze.begin
    print(
        f"{len(failures)} failed; the last was sent {last:.1f} s after the freeze, and {promised} s are promised"
    )
    assert {failure.host for failure in failures} == {freeze.pod.address}
    assert last < promised + SLACK_SECONDS
    assert len(failures) <= len(clients(3, "")) * (promised + SLACK_SECONDS) / PATIENCE_SECONDS
