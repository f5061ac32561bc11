"""Load: wrk as fast as a server answers, and clients that come at a fixed rate and do not wait for ever."""

import asyncio
import contextlib
import json
import math
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from benchmarks import BenchError
from benchmarks.servers import Server

CONNECTIONS = 16
SCRIPT = Path(__file__).with_name("wrk.lua")


def require_wrk() -> None:
    """Raise `BenchError` if wrk is missing."""
    if not shutil.which("wrk"):
        raise BenchError("wrk is missing; install it: apt-get install wrk, or brew install wrk")


class Run(NamedTuple):
    """One run of wrk against one server."""

    cpu_us: float
    requests_per_second: float
    p99_ms: float


def measure(server: Server, seconds: float) -> Run:
    """Load a server for so many whole seconds; return its CPU per request in microseconds, and what wrk saw.

    Raises `BenchError` if the server ends, or if anything but a 2xx comes back.
    """
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds:.0f}s", "-s", str(SCRIPT), server.url]
    before = server.cpu_seconds()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    server.check()
    cpu = server.cpu_seconds() - before
    try:
        seen = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise BenchError(
            f"wrk failed on {server.url}: {(done.stderr or done.stdout).strip()[:200]}"
        ) from None
    failed = ", ".join(f"{number} {kind}" for kind, number in seen["failed"].items() if number)
    if failed or not seen["requests"]:
        about = f"errors beside {seen['requests']} requests of wrk: {failed}: {server.last_words}"
        raise BenchError(f"{server.name} at {server.path}: {about}")
    return Run(cpu / seen["requests"] * 1e6, seen["requests"] / seen["seconds"], seen["p99_ms"])


class Outcome(NamedTuple):
    """What became of the requests that came at one rate, all per second.

    `p99_ms` is of the 200s, None without any; `p99_of_all_ms` is until any answer, and the client's patience for those
    that got none.
    """

    offered: float
    answered: float
    shed: float
    given_up: float
    p99_ms: float | None
    p99_of_all_ms: float


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that this share of all does not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


class Clients:
    """Clients of one server, each of which asks once; they keep connections for one another."""

    def __init__(self, url: str, patience: float) -> None:
        """Take the seconds after which a client gives up and closes its connection."""
        self.address, self.patience = urlsplit(url), patience
        self.request = (
            f"GET {self.address.path} HTTP/1.1\r\nHost: {self.address.netloc}\r\n\r\n".encode()
        )
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.seconds: defaultdict[int, list[float]] = defaultdict(
            list
        )  # until the answer, by its status

    async def ask(self, due: float, *, counts: bool) -> None:
        """Ask, and count the answer if it `counts`: 0 is for whoever gave up."""
        status, loop = 0, asyncio.get_running_loop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(due + self.patience):
                status = await self._exchange()
        if counts:
            self.seconds[status].append(loop.time() - due)

    async def _exchange(self) -> int:
        reader, writer = self.idle.pop() if self.idle else await self._connect()
        reusable = False
        try:
            writer.write(self.request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(
                int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            )
            reusable = b"connection: close" not in head
        finally:
            if reusable:
                self.idle.append((reader, writer))
            else:
                writer.transport.abort()
        return int(head[9:12])

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        assert self.address.hostname
        return await asyncio.open_connection(self.address.hostname, self.address.port)

    async def offer(self, rate: float, settle: float, seconds: float) -> Outcome:
        """Send requests at a rate, whether or not earlier ones are answered; count those after `settle` seconds."""
        loop = asyncio.get_running_loop()
        start = loop.time() + 0.1
        async with asyncio.TaskGroup() as group:
            for number in range(int(rate * (settle + seconds))):
                due = start + number / rate
                if (wait := due - loop.time()) > 0:
                    await asyncio.sleep(wait)
                group.create_task(self.ask(due, counts=due >= start + settle))
        for _, writer in self.idle:
            writer.close()
        if strange := set(self.seconds) - {0, 200, 503}:
            raise BenchError(f"{self.address.geturl()}: answered {strange.pop()} under load")
        answered, shed, given_up = (len(self.seconds[status]) / seconds for status in (200, 503, 0))
        p99 = percentile(self.seconds[200], 0.99) * 1000 if self.seconds[200] else None
        of_all = (
            percentile([each for status in self.seconds.values() for each in status], 0.99) * 1000
        )
        return Outcome(rate, answered, shed, given_up, p99, of_all)


def ramp_step(
    server: Server, rate: float, settle: float, seconds: float, patience: float
) -> Outcome:
    """Offer one rate to a server; raises `BenchError` if it ends, or answers anything but 200 and 503."""
    try:
        outcome = asyncio.run(Clients(server.url, patience).offer(rate, settle, seconds))
    except ExceptionGroup as errors:
        server.check()
        raise BenchError(
            f"{server.name}: {errors.exceptions[0]!r} at {rate:g} requests/s"
        ) from None
    server.check()
    return outcome
