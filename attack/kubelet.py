"""A pod as a kubelet runs it: a real service, on a loopback address of its own."""

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
    """A pod with its container, its probes and its state."""

    def __init__(
        self, address: str, manifest: Manifest, directory: Path, record: Callable[[str], None]
    ) -> None:
        self.address = address
        self.manifest = manifest
        self.directory = directory
        #: The volume of the secrets, which contains nothing else.
        self.secrets = directory / "secrets"
        self.secrets.mkdir()
        self.record = record
        self.is_deleted = False
        self.is_ready = False
        self.ready_at = math.inf
        self.has_failed = False
        self.has_ended = False
        #: One process for each start of the container.
        self.processes: list[subprocess.Popen[bytes]] = []
        for name, text in manifest.secrets.items():
            (self.secrets / name).write_text(text)

    @property
    def is_available(self) -> bool:
        """Whether it has been ready for `minReadySeconds`."""
        return self.is_ready and time.monotonic() - self.ready_at >= self.manifest.min_ready

    @property
    def exit_codes(self) -> list[int]:
        """The exit codes of its container, one for each process that has ended."""
        codes = [process.returncode for process in self.processes]
        return [code for code in codes if code is not None]

    @property
    def output(self) -> str:
        """The output of its container."""
        return (self.directory / "log").read_text()

    async def run(self) -> None:
        """Run the container, restarting it without back-off, until the pod is deleted."""
        while not self.is_deleted:
            self._start()
            async with asyncio.TaskGroup() as group:
                probes = group.create_task(self._probe())
                while self._should_run():
                    await asyncio.sleep(TICK_SECONDS)
                await self._end()
                probes.cancel()
            self._set_ready(False)
            self.has_failed = False
        self.has_ended = True

    def _should_run(self) -> bool:
        is_running = self.processes[-1].poll() is None
        return is_running and not self.is_deleted and not self.has_failed

    def _start(self) -> None:
        ports = self.manifest.ports
        own = {
            "BIND": f"{self.address}:{ports['http']}",
            "METRICS_BIND": f"{self.address}:{ports['metrics']}",
            "SECRETS_DIR": str(self.secrets),
            "AUTH_DISABLED": "true",
            "PROMETHEUS_MULTIPROC_DIR": str(self.directory / "metrics"),
        }
        with (self.directory / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "gunicorn"],
                cwd=PROJECT,
                env=os.environ | self.manifest.env | own,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A session of its own: one signal reaches all its processes.
                start_new_session=True,
            )
        self.processes.append(process)

    async def _end(self) -> None:
        """End the container: preStop, SIGTERM, and SIGKILL after the grace period.

        All its processes end with its PID 1, as in a container.
        """
        process = self.processes[-1]
        deadline = time.monotonic() + self.manifest.grace
        if process.poll() is None:
            self.record(f"{self.address} is terminating")
            await asyncio.sleep(self.manifest.pre_stop)
            process.terminate()
        while process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(TICK_SECONDS)
        self.kill()
        event = f"{self.address} has ended with {process.returncode}"
        if process.returncode > 0:
            event += f": {self.output[-300:]}"
        self.record(event)

    def signal(self, number: int) -> None:
        """Send a signal to all processes of the container."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.processes[-1].pid, number)

    def kill(self) -> None:
        """Kill the container if it has started and the pod has not ended.

        After the end, its PID may belong to another process.
        """
        if self.processes and not self.has_ended:
            self.signal(signal.SIGKILL)
            self.processes[-1].wait()

    async def _probe(self) -> None:
        async for has_started in self._verdicts(self.manifest.startup):
            if has_started:
                break
            self.has_failed = True
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_liveness(self.manifest.liveness))
            group.create_task(self._watch_readiness(self.manifest.readiness))

    async def _watch_liveness(self, probe: Probe) -> None:
        async for passed in self._verdicts(probe):
            if not passed and not self.has_failed:
                self.record(f"{self.address} is not alive")
                self.has_failed = True

    async def _watch_readiness(self, probe: Probe) -> None:
        async for passed in self._verdicts(probe):
            self._set_ready(passed)

    def _set_ready(self, is_ready: bool) -> None:
        if is_ready != self.is_ready:
            self.record(f"{self.address} is {'' if is_ready else 'not '}ready")
            self.is_ready = is_ready
            self.ready_at = time.monotonic()

    async def _verdicts(self, probe: Probe) -> AsyncIterator[bool]:
        """Run a probe once a period; yield results that have reached their threshold."""
        await asyncio.sleep(probe.delay)
        due = time.monotonic()
        previous = False
        times = 0
        while True:
            passed = await self._passes(probe)
            times = times + 1 if passed == previous else 1
            previous = passed
            if times >= (probe.successes if passed else probe.failures):
                yield passed
            due += probe.period
            await asyncio.sleep(due - time.monotonic())

    async def _passes(self, probe: Probe) -> bool:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(probe.timeout):
                status_line = await self._request(probe)
            return status_line.startswith((b"HTTP/1.1 2", b"HTTP/1.1 3"))
        return False

    async def _request(self, probe: Probe) -> bytes:
        """Return the status line of the response, over a new connection."""
        reader, writer = await asyncio.open_connection(self.address, probe.port)
        with contextlib.closing(writer):
            headers = f"Host: {self.address}\r\nConnection: close\r\n"
            writer.write(f"GET {probe.path} HTTP/1.1\r\n{headers}\r\n".encode())
            return await reader.readline()
