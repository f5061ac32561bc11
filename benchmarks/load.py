"""Load: wrk at full speed, and open-loop clients that arrive at a fixed rate and give up."""

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
#: Connections that create payments: more than the pool has, so that requests wait for each other.
POST_CONNECTIONS = 64
HERE = Path(__file__).parent
#: The status under which `Clients` counts the requests that were given up.
GIVEN_UP = 0


def require_wrk() -> None:
    """Raise `BenchError` if wrk is missing."""
    if not shutil.which("wrk"):
        raise BenchError("wrk is missing; install it: apt-get install wrk, or brew install wrk")


class Run(NamedTuple):
    """One run of wrk against one server."""

    cpu_us: float
    requests_per_second: float
    p99_ms: float


def measure(
    server: Server, seconds: float, connections: int = CONNECTIONS, script: str = "wrk.lua"
) -> Run:
    """Load a server with wrk, for whole seconds; return the CPU per request and wrk's figures.

    Raises `BenchError` if the server exits, or if any response is not a 2xx.
    """
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:.0f}s", "-s", script, server.url]
    before = server.cpu_seconds()
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    server.check()
    cpu_seconds = server.cpu_seconds() - before
    try:
        result = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        output = (done.stderr or done.stdout).strip()[:200]
        raise BenchError(f"wrk failed on {server.url}: {output}") from None
    requests = result["requests"]
    failed = ", ".join(f"{number} {kind}" for kind, number in result["failed"].items() if number)
    if failed or not requests:
        problem = f"errors among {requests} requests of wrk: {failed}: {server.last_line}"
        raise BenchError(f"{server.name} at {server.path}: {problem}")
    return Run(cpu_seconds / requests * 1e6, requests / result["seconds"], result["p99_ms"])


class Outcome(NamedTuple):
    """The requests of one offered rate by their outcome, each per second.

    `p99_ms` covers the 200s, and is None without any. `p99_of_all_ms` covers all responses, and
    the client's patience for the requests that were given up.
    """

    offered: float
    answered: float
    shed: float
    given_up: float
    p99_ms: float | None
    p99_of_all_ms: float


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share of all values does not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


class Clients:
    """Clients of one server, each with one request; they share keep-alive connections."""

    def __init__(self, url: str, patience: float) -> None:
        """`patience` is the number of seconds after which a client closes its connection."""
        self.address = urlsplit(url)
        self.patience = patience
        host = f"Host: {self.address.netloc}"
        self.request = f"GET {self.address.path} HTTP/1.1\r\n{host}\r\n\r\n".encode()
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        #: Seconds to each response, by status.
        self.seconds: defaultdict[int, list[float]] = defaultdict(list)

    async def get(self, due: float, *, counts: bool) -> None:
        """Send one request; if it `counts`, record its status and time, or that it was given up."""
        status = GIVEN_UP
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(due + self.patience):
                status = await self._exchange()
        if counts:
            self.seconds[status].append(asyncio.get_running_loop().time() - due)

    async def _exchange(self) -> int:
        reader, writer = self.idle.pop() if self.idle else await self._connect()
        is_reusable = False
        try:
            writer.write(self.request)
            headers = (await reader.readuntil(b"\r\n\r\n")).lower()
            _, _, after = headers.partition(b"content-length:")
            await reader.readexactly(int(after.partition(b"\r\n")[0]))
            is_reusable = b"connection: close" not in headers
        finally:
            if is_reusable:
                self.idle.append((reader, writer))
            else:
                writer.transport.abort()
        return int(headers[9:12])

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        assert self.address.hostname
        return await asyncio.open_connection(self.address.hostname, self.address.port)

    async def offer(self, rate: float, settle: float, seconds: float) -> Outcome:
        """Send requests at a rate, without waiting for responses.

        Requests of the first `settle` seconds are not counted. Raises `BenchError` for any status
        but 200 and 503.
        """
        loop = asyncio.get_running_loop()
        start = loop.time() + 0.1
        async with asyncio.TaskGroup() as group:
            for number in range(int(rate * (settle + seconds))):
                due = start + number / rate
                wait = due - loop.time()
                if wait > 0:
                    await asyncio.sleep(wait)
                group.create_task(self.get(due, counts=due >= start + settle))
        for _, writer in self.idle:
            writer.close()
        return self._outcome(rate, seconds)

    def _outcome(self, rate: float, seconds: float) -> Outcome:
        unexpected = set(self.seconds) - {GIVEN_UP, 200, 503}
        if unexpected:
            raise BenchError(f"{self.address.geturl()}: returned {unexpected.pop()} under load")
        succeeded = self.seconds[200]
        all_requests = [each for status in self.seconds.values() for each in status]
        return Outcome(
            offered=rate,
            answered=len(succeeded) / seconds,
            shed=len(self.seconds[503]) / seconds,
            given_up=len(self.seconds[GIVEN_UP]) / seconds,
            p99_ms=percentile(succeeded, 0.99) * 1000 if succeeded else None,
            p99_of_all_ms=percentile(all_requests, 0.99) * 1000,
        )


def ramp_step(
    server: Server, rate: float, settle: float, seconds: float, patience: float
) -> Outcome:
    """Offer one rate to a server.

    Raises `BenchError` if the server exits, or returns any status but 200 and 503.
    """
    try:
        outcome = asyncio.run(Clients(server.url, patience).offer(rate, settle, seconds))
    except ExceptionGroup as errors:
        server.check()
        problem = f"{errors.exceptions[0]!r} at {rate:g} requests/s"
        raise BenchError(f"{server.name}: {problem}") from None
    server.check()
    return outcome
