"""Rolling updates without a cluster: the Deployment controller and kube-proxy.

The pods are real processes; kubelet.py runs them. A client that opens a connection gets an address
from a `Balancer` and connects to it directly. So does kube-proxy: it decides where a new connection
goes, and does not touch it afterwards.
"""

import asyncio
import contextlib
import random
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.service_process import eventually

from kubelet import TICK_SECONDS, Pod
from manifest import Manifest

#: A change of the endpoints reaches each node within this time.
LAG_SECONDS = 3.0
NODES = 4
START_SECONDS = 40.0


class Balancer:
    """The kube-proxy of one node: learns late of changes, for new connections only."""

    def __init__(self) -> None:
        self.versions: deque[tuple[float, Sequence[str]]] = deque([(0.0, ())])

    def learn(self, addresses: Sequence[str]) -> None:
        """Use these addresses within `LAG_SECONDS` from now, after all earlier versions."""
        at = time.monotonic() + random.uniform(0, LAG_SECONDS)
        latest, _ = self.versions[-1]
        self.versions.append((max(at, latest), addresses))

    def pick(self) -> str:
        """Return the address for a new connection.

        Raises `ConnectionRefusedError` if no address is known.
        """
        while len(self.versions) > 1 and self.versions[1][0] <= time.monotonic():
            self.versions.popleft()
        _, addresses = self.versions[0]
        if not addresses:
            raise ConnectionRefusedError
        return random.choice(addresses)


class Progress(NamedTuple):
    """The numbers whose increase is progress of a rollout."""

    new: int = 0
    #: Minus the number of pods of other releases.
    old: int = 0
    ready: int = 0
    available: int = 0


class Cluster:
    """A Deployment: starts and deletes pods as its manifest requires."""

    def __init__(self, manifest: Manifest, directory: Path) -> None:
        self.manifest = manifest
        self.previous = manifest
        self.directory = directory
        self.network = f"127.{random.randint(1, 254)}.{random.randint(0, 255)}"
        self.pods: list[Pod] = []
        self.balancers = [Balancer() for _ in range(NODES)]
        self.endpoints: list[str] = []
        self.progress = Progress()
        self.progressed_at = time.monotonic()
        self.events: list[tuple[float, str]] = []

    @property
    def live(self) -> list[Pod]:
        """The pods that are not deleted."""
        return [pod for pod in self.pods if not pod.is_deleted]

    @property
    def is_complete(self) -> bool:
        """Whether all pods are of this release and available.

        Then `kubectl rollout status` succeeds.
        """
        return len(self.live) == self.manifest.replicas and all(
            pod.is_available and pod.manifest is self.manifest for pod in self.live
        )

    @property
    def is_settled(self) -> bool:
        """Whether the rollout is complete and all deleted pods have ended."""
        return self.is_complete and all(pod.has_ended for pod in self.pods if pod.is_deleted)

    @property
    def has_exceeded_its_deadline(self) -> bool:
        """Whether there was no progress for `progressDeadlineSeconds`.

        Then `kubectl rollout status` fails.
        """
        seconds = time.monotonic() - self.progressed_at
        return not self.is_complete and seconds > self.manifest.progress_deadline

    def pick(self) -> tuple[str, int]:
        """Return the address for a new connection of a client on a random node."""
        return random.choice(self.balancers).pick(), self.manifest.serving_port

    def record(self, event: str) -> None:
        """Add an event to the timeline, unless it repeats the last one."""
        if not self.events or self.events[-1][1] != event:
            self.events.append((time.monotonic(), event))

    def update(self, manifest: Manifest, name: str = "update") -> None:
        """Apply another release."""
        self.record(name)
        self.previous = self.manifest
        self.manifest = manifest
        self.progressed_at = time.monotonic()

    def undo(self) -> None:
        """Apply the previous release, as `kubectl rollout undo` does."""
        self.update(self.previous, "undo")

    def evict(self, pod: Pod) -> bool:
        """Delete a pod if its PodDisruptionBudget allows it; return whether it does.

        Otherwise the API of Kubernetes responds with 429.
        """
        ready = sum(each.is_ready for each in self.live)
        required = self.manifest.replicas - self.manifest.disruptions
        if pod.is_ready:
            is_allowed = ready > required
        else:
            is_allowed = self.manifest.evicts_unready or ready >= required
        self.record(f"eviction of {pod.address} {'granted' if is_allowed else 'rejected'}")
        if is_allowed:
            pod.is_deleted = True
        return is_allowed

    async def run(self, stop: threading.Event) -> None:
        """Follow the manifest until `stop` is set; then kill the remaining pods."""
        try:
            async with asyncio.TaskGroup() as kubelets:
                tasks = []
                while not stop.is_set():
                    tasks += [kubelets.create_task(pod.run()) for pod in self._reconcile()]
                    self._publish()
                    await asyncio.sleep(TICK_SECONDS)
                for task in tasks:
                    task.cancel()
        finally:
            for pod in self.pods:
                pod.kill()

    def _reconcile(self) -> list[Pod]:
        """Add and delete pods as the Deployment controller does; return the pods to start.

        The rules are those of rolling.go in Kubernetes.
        """
        wanted = self.manifest
        new = [pod for pod in self.live if pod.manifest is wanted]
        room = min(wanted.replicas - len(new), wanted.replicas + wanted.surge - len(self.live))
        starting = [self._add() for _ in range(room)]
        self._delete_old(wanted.replicas - wanted.unavailable)
        self._note_progress()
        return starting

    def _delete_old(self, least: int) -> None:
        """Delete pods of other releases while `least` pods stay available.

        Unavailable pods are deleted first.
        """
        old = [pod for pod in self.live if pod.manifest is not self.manifest]
        new = [pod for pod in self.live if pod.manifest is self.manifest]
        starting = sum(not pod.is_available for pod in new)
        spare = max(0, len(self.live) - least - starting)
        deleted = [pod for pod in old if not pod.is_available][:spare]
        spare = max(0, sum(pod.is_available for pod in self.live) - least)
        deleted += [pod for pod in old if pod.is_available][:spare]
        for pod in deleted:
            pod.is_deleted = True

    def _note_progress(self) -> None:
        live = self.live
        new = sum(pod.manifest is self.manifest for pod in live)
        progress = Progress(
            new=new,
            old=new - len(live),
            ready=sum(pod.is_ready for pod in live),
            available=sum(pod.is_available for pod in live),
        )
        if any(now > before for now, before in zip(progress, self.progress, strict=True)):
            self.progressed_at = time.monotonic()
        self.progress = progress

    def _add(self) -> Pod:
        number = len(self.pods) + 1
        directory = self.directory / str(number)
        directory.mkdir()
        pod = Pod(f"{self.network}.{number}", self.manifest, directory, self.record)
        self.pods.append(pod)
        return pod

    def _publish(self) -> None:
        """Send changed endpoints to the nodes.

        A deleted pod is no endpoint, even while it is ready.
        """
        endpoints = [pod.address for pod in self.live if pod.is_ready]
        if endpoints != self.endpoints:
            self.endpoints = endpoints
            for balancer in self.balancers:
                balancer.learn(endpoints)


@contextlib.contextmanager
def running(manifest: Manifest) -> Iterator[Cluster]:
    """Run the Deployment of a manifest.

    The block begins when all nodes know all its pods.
    """
    with tempfile.TemporaryDirectory(prefix="cluster-") as name, ThreadPoolExecutor(1) as thread:
        cluster = Cluster(manifest, Path(name))
        stop = threading.Event()
        task = thread.submit(asyncio.run, cluster.run(stop))
        try:
            eventually(lambda: task.done() or cluster.is_complete, START_SECONDS)
            assert not task.done()
            time.sleep(LAG_SECONDS)
            yield cluster
        except BaseException:
            print(*(event for _, event in cluster.events), sep="\n")
            raise
        finally:
            stop.set()
            task.result()
