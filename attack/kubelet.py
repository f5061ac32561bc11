"""A pod, as a kubelet runs it: a real process of the real service, on a loopback address of its own."""

import asyncio
import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from tests.service_process import PROJECT

from manifest import Manifest, Probe

TICK_SECONDS = 0.05


class Pod:
    """A pod, and what its kubelet does with it."""

    def __init__(
        self, address: str, manifest: Manifest, folder: Path, tell: Callable[[str], None]
    ) -> None:
        self.address, self.manifest, self.folder, self.tell = address, manifest, folder, tell
        self.is_deleted = self.is_ready = self.has_failed = self.has_ended = False
        self.ready_at = math.inf
        self.lives: list[subprocess.Popen[bytes]] = []
        for name, text in manifest.secrets.items():
            (folder / name).write_text(text)

    @property
    def is_available(self) -> bool:
        """Tell whether it has been ready for `minReadySeconds`."""
        return self.is_ready and time.monotonic() - self.ready_at >= self.manifest.min_ready

    @property
    def exits(self) -> list[int]:
        """The exit codes of its container, one for each time that it ended."""
        return [code for life in self.lives if (code := life.returncode) is not None]

    @property
    def text(self) -> str:
        """What it has printed."""
        return (self.folder / "log").read_text()

    async def run(self) -> None:
        """Run the container, and again when it has failed, until the pod is deleted; there is no back-off."""
        while not self.is_deleted:
            self._start()
            async with asyncio.TaskGroup() as group:
                probes = group.create_task(self._probe())
                while not self.is_deleted and not self.has_failed and self.lives[-1].poll() is None:
                    await asyncio.sleep(TICK_SECONDS)
                await self._end()
                probes.cancel()
            self._set_ready(False)
            self.has_failed = False
        self.has_ended = True

    def _start(self) -> None:
        ports = self.manifest.ports
        own = {
            "BIND": f"{self.address}:{ports['http']}",
            "METRICS_BIND": f"{self.address}:{ports['metrics']}",
        }
        own |= {
            "SECRETS_DIR": str(self.folder),
            "PROMETHEUS_MULTIPROC_DIR": str(self.folder / "metrics"),
        }
        with (self.folder / "log").open("ab") as log:
            life = subprocess.Popen(
                [sys.executable, "-m", "gunicorn"],
                cwd=PROJECT,
                env=os.environ | self.manifest.env | own,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that all its processes can be signalled at once
            )
        self.lives.append(life)

    async def _end(self) -> None:
        """End the container in order, and by force when its time is over; whatever ran in it ends with its PID 1."""
        life, end = self.lives[-1], time.monotonic() + self.manifest.grace
        if life.poll() is None:
            self.tell(f"{self.address} is told to end")
            await asyncio.sleep(self.manifest.pre_stop)
            life.terminate()
        while life.poll() is None and time.monotonic() < end:
            await asyncio.sleep(TICK_SECONDS)
        self.kill()
        last_words = f": {self.text[-300:]}" if life.returncode > 0 else ""
        self.tell(f"{self.address} has ended with {life.returncode}{last_words}")

    def signal(self, number: int) -> None:
        """Signal all processes of the container."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.lives[-1].pid, number)

    def kill(self) -> None:
        """Kill the container, unless it has not begun, or its pid may be another's by now."""
        if self.lives and not self.has_ended:
            self.signal(signal.SIGKILL)
            self.lives[-1].wait()

    async def _probe(self) -> None:
        async for started in self._verdicts(self.manifest.startup):
            if started:
                break
            self.has_failed = True
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_liveness(self.manifest.liveness))
            group.create_task(self._watch_readiness(self.manifest.readiness))

    async def _watch_liveness(self, probe: Probe) -> None:
        async for passed in self._verdicts(probe):
            if not passed and not self.has_failed:
                self.tell(f"{self.address} is not alive")
                self.has_failed = True

    async def _watch_readiness(self, probe: Probe) -> None:
        async for passed in self._verdicts(probe):
            self._set_ready(passed)

    def _set_ready(self, is_ready: bool) -> None:
        if is_ready != self.is_ready:
            self.tell(f"{self.address} is {'' if is_ready else 'not '}ready")
            self.is_ready, self.ready_at = is_ready, time.monotonic()

    async def _verdicts(self, probe: Probe) -> AsyncIterator[bool]:
        """Ask once a period; yield whether it passed, once that was so often enough."""
        await asyncio.sleep(probe.delay)
        due, before, times = time.monotonic(), False, 0
        while True:
            passed = await self._passes(probe)
            times = times + 1 if passed == before else 1
            if times >= (probe.successes if passed else probe.failures):
                yield passed
            before = passed
            due += probe.period
            await asyncio.sleep(due - time.monotonic())

    async def _passes(self, probe: Probe) -> bool:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(probe.timeout):
                reader, writer = await asyncio.open_connection(self.address, probe.port)
                with contextlib.closing(writer):
                    request = f"GET {probe.path} HTTP/1.1\r\nHost: {self.address}\r\nConnection: close\r\n\r\n"
                    writer.write(request.encode())
                    line = await reader.readline()
                    return line.startswith((b"HTTP/1.1 2", b"HTTP/1.1 3"))
        return False
