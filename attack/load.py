"""Load that accounts for every request: answered with a status, or failed for a reason. Nothing is tried again.

with load(port, 8 * [GET], 2 * [POST]) as result:
    ...  # do to the service what it has to bear
assert result.failures == []
"""

import asyncio
import contextlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple
from uuid import uuid4

import uvloop

TIMEOUT_SECONDS = 40.0
#: Whom to ask: a loopback port, or what returns host and port for each new connection; it may raise `OSError`.
Target = int | Callable[[], tuple[str, int]]
#: In a request it stands for a key that is new each time.
KEY = "key-that-is-another-one-each-time"


@dataclass(frozen=True)
class Kind:
    """What a client does, over and over: sends `request`, and wants an answer with one of `statuses`."""

    name: str
    request: bytes
    statuses: tuple[int, ...] = (200,)
    keeps_alive: bool = True
    #: The client waits for a random time up to this between two requests.
    pause_seconds: float = 0.01
    timeout_seconds: float = TIMEOUT_SECONDS


def get(
    path: str,
    name: str = "",
    *,
    statuses: tuple[int, ...] = (200,),
    keeps_alive: bool = True,
    pause: float = 0.01,
) -> Kind:
    """Return a client that gets `path`; `pause` is the longest in seconds."""
    request = f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode()
    return Kind(name or f"GET {path}", request, statuses, keeps_alive, pause)


def post(
    path: str,
    body: object,
    name: str = "",
    *,
    statuses: tuple[int, ...] = (201,),
    keeps_alive: bool = True,
    pause: float = 0.01,
) -> Kind:
    """Return a client that posts `body` as JSON to `path`; `pause` is the longest in seconds."""
    data = json.dumps(body).encode()
    fields = {
        "Host": "test",
        "Content-Type": "application/json",
        "Content-Length": len(data),
        "Idempotency-Key": KEY,
    }
    head = "\r\n".join(
        [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    )
    return Kind(name or f"POST {path}", head.encode() + data, statuses, keeps_alive, pause)


_PAYMENT = {"amount": 1250, "currency": "EUR", "reference": "attack"}
GET = get("/", "GET")
GET_NEW = get("/", "GET, new connection", keeps_alive=False)
POST = post("/payments", _PAYMENT, "POST")
POST_NEW = post("/payments", _PAYMENT, "POST, new connection", keeps_alive=False)
SLOW = get("/slow?seconds=2", "GET of 2 s")  # of tests/fault_routes.py
#: A bit of everything; many POSTs, since proxies ask nobody else for those.
MIXED = 8 * [GET] + 3 * [GET_NEW] + 6 * [POST] + 4 * [POST_NEW] + 4 * [SLOW]


class Failure(NamedTuple):
    """A request that failed: when it began and ended on `time.monotonic`, what it was, and whom it asked."""

    begin: float
    end: float
    kind: str
    reason: str
    host: str


@dataclass
class Result:
    """What became of all requests; it may be read while the load still runs."""

    answered: Counter[tuple[str, int]] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    slowest_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All requests, answered as wanted or not."""
        return self.answered.total() + sum(
            not each.reason.startswith("status") for each in self.failures
        )

    @property
    def failed(self) -> Counter[tuple[str, str]]:
        """Failed requests by kind and reason."""
        return Counter((each.kind, each.reason) for each in self.failures)

    def __str__(self) -> str:
        parts = {
            f"{kind}: {status}": number for (kind, status), number in sorted(self.answered.items())
        }
        failed = {
            f"{kind}: {reason}": number for (kind, reason), number in sorted(self.failed.items())
        }
        return f"{self.total} requests, {len(self.failures)} failed {failed}; answers {parts}"


class _ClosedError(Exception):
    pass


class _Client:
    def __init__(self, target: Target, kind: Kind, result: Result, stop: threading.Event) -> None:
        self.target, self.kind, self.result, self.stop, self.host = target, kind, result, stop, ""
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def run(self) -> None:
        """Ask until stopped; a request that has begun is waited for."""
        kind, result = self.kind, self.result
        while not self.stop.is_set():
            begin, status = time.monotonic(), 0
            try:
                async with asyncio.timeout(kind.timeout_seconds):
                    status = await self._ask()
                result.answered[kind.name, status] += 1
                reason = "" if status in kind.statuses else f"status {status}"
            except ConnectionRefusedError:
                reason = "refused"
            except TimeoutError:
                reason = "timeout"
            except _ClosedError as error:
                reason = str(error)
            except OSError as error:
                reason = (
                    "reset"
                    if isinstance(error, ConnectionError)
                    else f"{type(error).__name__}: {error.strerror}"
                )
            if not status:
                self._close()
            end = time.monotonic()
            result.slowest_seconds[kind.name] = max(
                end - begin, result.slowest_seconds.get(kind.name, 0.0)
            )
            if reason:
                result.failures.append(Failure(begin, end, kind.name, reason, self.host))
            await asyncio.sleep(random.uniform(0, max(kind.pause_seconds, 0.05 if reason else 0)))
        self._close()

    async def _ask(self) -> int:
        """Return the status of the answer."""
        if self.streams is None:
            self.host, port = (
                ("127.0.0.1", self.target) if isinstance(self.target, int) else self.target()
            )
            self.streams = await asyncio.open_connection(self.host, port)
        reader, writer = self.streams
        writer.write(self.kind.request.replace(KEY.encode(), uuid4().hex.encode()))
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(
                int(head.split(b"\r\ncontent-length:", 1)[1].split(b"\r\n", 1)[0])
            )
        except asyncio.IncompleteReadError as error:
            raise _ClosedError(
                "closed within the answer" if error.partial else "closed before the answer"
            ) from None
        if not self.kind.keeps_alive or b"\r\nconnection: close\r\n" in head:
            self._close()
        return int(head[9:12])

    def _close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


@contextlib.contextmanager
def load(target: Target, *clients: Sequence[Kind]) -> Iterator[Result]:
    """Have one client of each kind ask the target from here to the end of the block; then wait for them."""
    result, stop = Result(), threading.Event()

    async def run() -> None:
        async with asyncio.TaskGroup() as group:
            for kind in [kind for kinds in clients for kind in kinds]:
                group.create_task(_Client(target, kind, result, stop).run())

    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(uvloop.run, run())
        try:
            yield result
        finally:
            stop.set()
            running.result()
