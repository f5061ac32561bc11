"""The rendered production overlay, as a simulated cluster runs it, under load."""

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

#: The least number of requests over connections of each kind.
REQUESTS = 10_000
CONNECTIONS = {"keep-alive": True, "new connection": False}
UPDATE_SECONDS = 120.0
#: The timeout of clients while a pod hangs.
PATIENCE_SECONDS = 2.0
#: The machine is busy.
SLACK_SECONDS = 2.0
#: In place of the 300 s of the manifest.
PROGRESS_DEADLINE_SECONDS = 20
UNREACHABLE = {
    "database_url": "postgresql://app@127.0.0.1:1/postgres",
    "redis_url": "redis://127.0.0.1:1/0",
}


def clients(number: int, reference: str, timeout_seconds: float = TIMEOUT_SECONDS) -> list[Kind]:
    """Return `number` clients of each kind; their payments have a reference."""
    payment = {"amount": 1250, "currency": "EUR", "reference": reference}
    kinds = []
    for name, keeps_alive in CONNECTIONS.items():
        kinds += [
            get("/", f"GET, {name}", keeps_alive=keeps_alive, pause=0.05),
            post("/payments", payment, f"POST, {name}", keeps_alive=keeps_alive, pause=0.05),
        ]
    return number * [replace(kind, timeout_seconds=timeout_seconds) for kind in kinds]


def fewest(result: Result) -> int:
    """Return the number of responses over the kind of connection that has fewer."""
    return min(
        sum(n for (kind, _), n in result.responses.items() if kind.endswith(connection))
        for connection in CONNECTIONS
    )


def report(cluster: Cluster, result: Result) -> None:
    """Print the timeline of events and failed requests."""
    events = list(cluster.events)
    for failure in result.failures[:50]:
        seconds = failure.end - failure.begin
        text = f"{failure.kind} to {failure.host}: {failure.reason} after {seconds:.3f} s"
        events.append((failure.begin, text))
    events.sort()
    begin, _ = events[0]
    print(result, *(f"{at - begin:8.3f} {text}" for at, text in events), sep="\n")


def stored(url: str, reference: str) -> int:
    """Return the number of payments in the database with a reference."""
    query = "select count(*) from payments where reference = $1"

    async def count() -> int:
        connection = await asyncpg.connect(url)
        try:
            return int(await connection.fetchval(query, reference))
        finally:
            await connection.close()

    return asyncio.run(count())


@pytest.fixture(scope="module")
def prod(database_url: str, redis: Redis) -> Manifest:
    """The production overlay, with Postgres and Redis of this session."""
    if sys.platform != "linux":
        pytest.skip("each pod has an address in 127.0.0.0/8; only Linux has all of them")
    return read("prod", {"database_url": database_url, "redis_url": redis.url})


class HungPod:
    """A pod hangs under load until its kubelet has restarted it.

    Liveness fails after 43 s; then the pod has 60 s of grace.
    """

    def __init__(self, prod: Manifest) -> None:
        self.prod = prod
        self.is_cancelled = False

    def run(self) -> None:
        """Run the scenario, in two minutes."""
        longest = self.prod.liveness.notices_within + self.prod.grace + START_SECONDS
        kinds = clients(3, "hung pod", PATIENCE_SECONDS)
        with running(self.prod) as self.cluster, load(self.cluster.pick, kinds) as self.result:
            time.sleep(1)
            self.pod = self.cluster.pods[0]
            self.begin = time.monotonic()
            self.cluster.record(f"{self.pod.address} hangs")
            self.pod.signal(signal.SIGSTOP)
            eventually(self._is_over, longest)
            time.sleep(LAG_SECONDS + 1)
            exit_codes = [pod.exit_codes for pod in self.cluster.pods]
            assert exit_codes == [[-signal.SIGKILL], [], []]

    def _is_over(self) -> bool:
        has_restarted = bool(self.pod.exit_codes) and self.pod.is_ready
        return self.is_cancelled or has_restarted


@pytest.fixture(scope="module", autouse=True)
def hung_pod(prod: Manifest) -> Iterator["tuple[HungPod, Future[None]]"]:
    """The scenario of a hung pod, which runs two minutes in the background."""
    with ThreadPoolExecutor(1) as thread:
        scenario = HungPod(prod)
        yield scenario, thread.submit(scenario.run)
        scenario.is_cancelled = True


def test_rolling_update_loses_no_request(prod: Manifest, database_url: str) -> None:
    with running(prod) as cluster:
        with load(cluster.pick, clients(6, "update")) as result:
            updates = 0
            while not updates or fewest(result) < REQUESTS:
                updates += 1
                cluster.update(prod.but(SERVICE_VERSION=str(updates)))
                eventually(lambda: cluster.is_settled, UPDATE_SECONDS)
        report(cluster, result)
        assert result.failures == []
        created = sum(n for (_, status), n in result.responses.items() if status == 201)
        assert stored(database_url, "update") == created
        ended = cluster.pods[: -prod.replicas]
        assert [pod.exit_codes for pod in ended] == [[0]] * prod.replicas * updates
        lines = [json.loads(line) for pod in ended for line in pod.output.splitlines()]
        assert {line["level"] for line in lines} == {"info"}


def test_rolling_update_without_drain_loses_some_requests(prod: Manifest) -> None:
    """The control: the load above can fail."""
    with running(prod.but(DRAIN_SECONDS="0")) as cluster:
        with load(cluster.pick, clients(6, "no drain")) as result:
            cluster.update(prod)
            eventually(lambda: result.failures or cluster.is_settled, UPDATE_SECONDS)
        report(cluster, result)
        assert result.failures


def test_release_that_is_never_ready_stops_at_one_pod(prod: Manifest) -> None:
    """Its undo loses no request.

    The pod is never restarted, since liveness checks no dependency: it ends once, by the undo.
    """
    broken_release = replace(read("prod", UNREACHABLE), progress_deadline=PROGRESS_DEADLINE_SECONDS)
    with running(prod) as cluster:
        before = cluster.live
        with load(cluster.pick, clients(3, "undo")) as result:
            cluster.update(broken_release)
            eventually(lambda: cluster.has_exceeded_its_deadline, UPDATE_SECONDS)
            *others, broken = cluster.live
            assert others == before
            cluster.undo()
            eventually(lambda: cluster.is_settled, UPDATE_SECONDS)
        report(cluster, result)
        assert result.failures == []
        assert cluster.live == before
        assert broken.exit_codes == [0]
        assert broken.ready_at == math.inf


def test_node_drain_respects_the_budget_and_loses_no_request(prod: Manifest) -> None:
    with running(prod) as cluster:
        first, *others = cluster.live
        with load(cluster.pick, clients(3, "node drain")) as result:
            assert cluster.evict(first)
            while others:
                # Each eviction is requested, and all are rejected.
                granted = [cluster.evict(pod) for pod in others]
                assert not any(granted)
                pod = others.pop()
                eventually(partial(cluster.evict, pod))
            eventually(lambda: cluster.is_settled, UPDATE_SECONDS)
        report(cluster, result)
        assert result.failures == []
        exit_codes = [pod.exit_codes for pod in cluster.pods]
        assert exit_codes == [[0]] * prod.replicas + [[]] * prod.replicas


def test_hung_pod_fails_requests_only_until_its_probes_notice(
    hung_pod: "tuple[HungPod, Future[None]]",
) -> None:
    scenario, future = hung_pod
    future.result()
    failures = scenario.result.failures
    report(scenario.cluster, scenario.result)
    promised = scenario.prod.readiness.notices_within + LAG_SECONDS
    last = max(failure.begin for failure in failures) - scenario.begin
    print(f"{len(failures)} requests failed; the last was sent {last:.1f} s after the pod hung")
    print(f"the probes promise {promised} s")
    assert {failure.host for failure in failures} == {scenario.pod.address}
    assert last < promised + SLACK_SECONDS
    assert len(failures) <= len(clients(3, "")) * (promised + SLACK_SECONDS) / PATIENCE_SECONDS
