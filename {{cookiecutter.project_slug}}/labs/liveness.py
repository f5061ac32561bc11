"""Lab 3: the database hangs for 20 s. What does a liveness probe do that asks it?"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from labs.picture import BAD, GOOD, GRAY, GREEN, ORANGE, Picture
from labs.stage import Instance, Ports, Stage, status, wait_until

NUMBER = 3
TITLE = "the database hangs for 20 s: does a restart help?"
HANG_SECONDS = 20.0
STEADY_SECONDS = 3.0
#: The fields of the probe, smaller than usual: the lab is short.
PERIOD_SECONDS = 1.0
TIMEOUT_SECONDS = 1.0
FAILURE_THRESHOLD = 3
REQUEST_SECONDS = 0.2
CLIENT_SECONDS = 5.0


class Pod:
    """An instance with a kubelet that restarts it when its liveness probe fails."""

    def __init__(self, stage: Stage, name: str, path: str, ports: Ports | None = None) -> None:
        """`path`: what the liveness probe requests."""
        self.stage = stage
        self.name = name
        self.path = path
        self.instance = stage.serve(ports=ports)
        #: When it was killed.
        self.restarts: list[float] = []
        #: Each request of a client to `/`, which needs no database: when, and whether it succeeded.
        self.requests: list[tuple[float, bool]] = []
        self._end = threading.Event()
        self._threads = [threading.Thread(target=each) for each in (self._probe, self._request)]

    def start(self, started_at: float) -> None:
        """Begin to probe and to send requests."""
        self.started_at = started_at
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop both."""
        self._end.set()
        for thread in self._threads:
            if thread.ident:
                thread.join()

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started_at

    def _probe(self) -> None:
        """Do what a kubelet does."""
        failures = 0
        while not self._end.wait(PERIOD_SECONDS):
            is_live = status(f"{self.instance.url}{self.path}", TIMEOUT_SECONDS) == 200
            failures = 0 if is_live else failures + 1
            if failures == FAILURE_THRESHOLD:
                failures = 0
                self._restart()

    def _restart(self) -> None:
        self.restarts.append(self.now)
        self.instance.kill()
        self.instance = self.stage.serve(port=self.instance.port)
        # The startup probe: liveness begins after it.
        while not self._end.wait(0.1) and not self._has_started(self.instance):
            pass

    @staticmethod
    def _has_started(instance: Instance) -> bool:
        return status(f"{instance.url}/health/live", TIMEOUT_SECONDS) == 200

    def _request(self) -> None:
        while not self._end.wait(REQUEST_SECONDS):
            at = self.now
            self.requests.append((at, status(f"{self.instance.url}/", CLIENT_SECONDS) == 200))

    @property
    def failed(self) -> int:
        """The number of requests that failed."""
        return sum(not is_good for _, is_good in self.requests)


def run(stage: Stage) -> None:
    """Let Postgres hang, with a pod of each kind next to each other."""
    pods = [
        Pod(stage, "liveness asks the database", "/health/ready"),
        Pod(stage, "liveness asks the process", "/health/live", stage.watch()),
    ]
    for pod in pods:
        pod.instance.wait_until_ready()
    stage.say(f"Postgres hangs for {HANG_SECONDS:g} s. A probe each {PERIOD_SECONDS:g} s;")
    stage.say(f"{FAILURE_THRESHOLD} failures in a row restart the pod.\n")
    started_at = time.monotonic()
    with watching(pods, started_at):
        time.sleep(STEADY_SECONDS)
        hang(stage.postgres.pid)
        after = time.monotonic() - started_at
        for pod in pods:
            url = f"{pod.instance.url}/health/ready"
            wait_until(lambda url=url: status(url) == 200, "ready again")  # type: ignore[misc]
        time.sleep(STEADY_SECONDS)
        end = time.monotonic() - started_at
    report(stage, pods)
    stage.picture = draw(pods, (after - HANG_SECONDS, after), end)


@contextmanager
def watching(pods: list[Pod], started_at: float) -> Iterator[None]:
    """Probe all pods during the block."""
    try:
        for pod in pods:
            pod.start(started_at)
        yield
    finally:
        for pod in pods:
            pod.stop()


def hang(pid: int) -> None:
    """Suspend Postgres: to its clients it looks like a machine that swaps."""
    parent = psutil.Process(pid)
    parent.suspend()
    processes = [parent, *parent.children(recursive=True)]
    try:
        for process in processes:
            process.suspend()
        time.sleep(HANG_SECONDS)
    finally:
        for process in processes:
            process.resume()


def report(stage: Stage, pods: list[Pod]) -> None:
    """Print the figures, and claim."""
    for pod in pods:
        stage.say(f"{pod.name}: {len(pod.restarts)} restarts")
        stage.say(f"    {pod.failed} of {len(pod.requests)} requests failed that need no database")
    naive, live = pods
    stage.claims.claim(
        f"liveness that asks the process alone: {len(live.restarts)} restarts,"
        f" {live.failed} failed requests",
        not live.restarts and not live.failed,
    )
    stage.claims.control(
        f"liveness that asks the database: {len(naive.restarts)} restarts,"
        f" {naive.failed} failed requests",
        len(naive.restarts) > 0 and naive.failed > 0,
    )


def draw(pods: list[Pod], hung: tuple[float, float], end: float) -> Picture:
    """Draw a strip in time for each pod: its requests and its restarts."""
    picture = Picture(900, 320, "Requests that need no database, while the database hangs")
    entries = [(GOOD, "served"), (BAD, "failed")]
    entries += [(GREEN, "the database responds"), (ORANGE, "it hangs")]
    picture.legend(16, 58, entries)
    left = 30
    scale = 840 / end
    picture.box(left, 82, 840, 12, GREEN)
    picture.box(left + hung[0] * scale, 82, (hung[1] - hung[0]) * scale, 12, ORANGE)
    for number, pod in enumerate(pods):
        top = 142 + 88 * number
        title = f"{pod.name}: {len(pod.restarts)} restarts, {pod.failed} failed requests"
        picture.text(left, top - 10, title, size=14, is_bold=True)
        for at, is_good in pod.requests:
            width = REQUEST_SECONDS * scale * 0.8
            picture.box(left + at * scale, top, width, 34, GOOD if is_good else BAD)
        for at in pod.restarts:
            picture.text(left + at * scale, top + 50, "^ restart", size=12)
    for second in range(0, int(end) + 1, 5):
        picture.text(left + second * scale, 306, f"{second} s", anchor="middle", color=GRAY)
    return picture
