"""A rolling update without a cluster: what a Deployment's controller and kube-proxy do to a service.

The pods are real processes; kubelet.py runs them. A client that opens a connection asks a `Balancer` for an address and
goes there itself: kube-proxy, too, decides where a connection goes, and never looks at it again.
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

from tests.service_process import eventually

from kubelet import TICK_SECONDS, Pod
from manifest import Manifest

#: A change of the endpoints reaches each node up to so late.
LAG_SECONDS = 3.0
NODES = 4
START_SECONDS = 40.0


class Balancer:
    """What the kube-proxy of one node knows: it learns late of changes, and only new connections obey it."""

    def __init__(self) -> None:
        self.versions: deque[tuple[float, Sequence[str]]] = deque([(0.0, ())])

    def learn(self, addresses: Sequence[str]) -> None:
        """Know these addresses, up to `LAG_SECONDS` from now, and not before what came earlier."""
        at = time.monotonic() + random.uniform(0, LAG_SECONDS)
        self.versions.append((max(at, self.versions[-1][0]), addresses))

    def pick(self) -> str:
        """Return the address for a new connection. Raises `ConnectionRefusedError` where none is known."""
        while len(self.versions) > 1 and self.versions[1][0] <= time.monotonic():
            self.versions.popleft()
        if not (addresses := self.versions[0][1]):
            raise ConnectionRefusedError
        return random.choice(addresses)


class Cluster:
    """A Deployment whose pods come and go as its manifest says."""

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        self.manifest, self.previous, self.folder = manifest, manifest, folder
        self.network = f"127.{random.randint(1, 254)}.{random.randint(0, 255)}"
        self.pods: list[Pod] = []
        self.balancers = [Balancer() for _ in range(NODES)]
        self.endpoints: list[str] = []
        self.progress, self.progressed_at = (0, 0, 0, 0), time.monotonic()
        self.events: list[tuple[float, str]] = []

    @property
    def live(self) -> list[Pod]:
        """The pods that are not deleted."""
        return [pod for pod in self.pods if not pod.is_deleted]

    @property
    def is_complete(self) -> bool:
        """Tell whether `kubectl rollout status` says so: all pods are of this release, and available."""
        return len(self.live) == self.manifest.replicas and all(
            pod.is_available and pod.manifest is self.manifest for pod in self.live
        )

    @property
    def is_settled(self) -> bool:
        """Tell whether it is complete, and those that were deleted have ended."""
        return self.is_complete and all(pod.has_ended for pod in self.pods if pod.is_deleted)

    @property
    def has_exceeded_its_deadline(self) -> bool:
        """Tell whether `kubectl rollout status` fails: nothing has become better for `progressDeadlineSeconds`."""
        return (
            not self.is_complete
            and time.monotonic() - self.progressed_at > self.manifest.progress_deadline
        )

    def pick(self) -> tuple[str, int]:
        """Return the address for a new connection of a client, which is on any node."""
        return random.choice(self.balancers).pick(), self.manifest.serving_port

    def tell(self, event: str) -> None:
        """Add to the time line, unless that was told just now."""
        if not self.events or self.events[-1][1] != event:
            self.events.append((time.monotonic(), event))

    def update(self, manifest: Manifest, name: str = "update") -> None:
        """Apply another release."""
        self.tell(name)
        self.previous, self.manifest = self.manifest, manifest
        self.progressed_at = time.monotonic()

    def undo(self) -> None:
        """Go back to the release before, as `kubectl rollout undo` does."""
        self.update(self.previous, "undo")

    def evict(self, pod: Pod) -> bool:
        """Delete a pod, unless the budget for disruptions is spent: then the API answers 429."""
        ready = sum(each.is_ready for each in self.live)
        wanted = self.manifest.replicas - self.manifest.disruptions
        allowed = (
            ready > wanted if pod.is_ready else self.manifest.evicts_unready or ready >= wanted
        )
        self.tell(f"eviction of {pod.address} {'granted' if allowed else 'refused'}")
        pod.is_deleted |= allowed
        return allowed

    async def run(self, stop: threading.Event) -> None:
        """Do what the manifest says until told to stop; then kill what is left."""
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
        """Decide as the controller of Deployments does (rolling.go in Kubernetes); return the pods to be started."""
        wanted = self.manifest
        new = [pod for pod in self.live if pod.manifest is wanted]
        room = min(wanted.replicas - len(new), wanted.replicas + wanted.surge - len(self.live))
        starting = [self._add() for _ in range(room)]
        self._delete_old(wanted.replicas - wanted.unavailable)
        self._note_progress()
        return starting

    def _delete_old(self, least: int) -> None:
        """Delete pods of other releases as far as `least` stay available: first those that are of no use."""
        old = [pod for pod in self.live if pod.manifest is not self.manifest]
        coming = sum(not pod.is_available for pod in self.live if pod not in old)
        spare = len(self.live) - least - coming
        deleted = [pod for pod in old if not pod.is_available][: max(0, spare)]
        spare = sum(pod.is_available for pod in self.live) - least
        deleted += [pod for pod in old if pod.is_available][: max(0, spare)]
        for pod in deleted:
            pod.is_deleted = True

    def _note_progress(self) -> None:
        live = self.live
        new = sum(pod.manifest is self.manifest for pod in live)
        ready, available = sum(pod.is_ready for pod in live), sum(pod.is_available for pod in live)
        progress = (new, new - len(live), ready, available)
        if any(now > before for now, before in zip(progress, self.progress, strict=True)):
            self.progressed_at = time.monotonic()
        self.progress = progress

    def _add(self) -> Pod:
        number = len(self.pods) + 1
        folder = self.folder / str(number)
        folder.mkdir()
        pod = Pod(f"{self.network}.{number}", self.manifest, folder, self.tell)
        self.pods.append(pod)
        return pod

    def _publish(self) -> None:
        """Tell the nodes of pods that are ready now, or no longer; one that is deleted counts no more at once."""
        endpoints = [pod.address for pod in self.live if pod.is_ready]
        if endpoints != self.endpoints:
            self.endpoints = endpoints
            for balancer in self.balancers:
                balancer.learn(endpoints)


@contextlib.contextmanager
def running(manifest: Manifest) -> Iterator[Cluster]:
    """Run the Deployment of a manifest, from the moment it is complete to the end of the block."""
    with tempfile.TemporaryDirectory(prefix="cluster-") as folder, ThreadPoolExecutor(1) as thread:
        cluster, stop = Cluster(manifest, Path(folder)), threading.Event()
        task = thread.submit(asyncio.run, cluster.run(stop))
        try:
            eventually(lambda: task.done() or cluster.is_complete, START_SECONDS)
            assert not task.done()
            time.sleep(LAG_SECONDS)  # until all nodes know
            yield cluster
        except BaseException:
            print(*(event for _, event in cluster.events), sep="\n")
            raise
        finally:
            stop.set()
            task.result()
