"""Load that accounts for every request, as a status or an error. It never retries.

with load(port, 8 * [GET], 2 * [POST]) as result:
    ...  # the fault that the service has to survive
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
#: After a failure, the pause is random up to at least this.
FAILURE_PAUSE_SECONDS = 0.05
#: A loopback port, or a function that returns host and port for each new connection.
#: It may raise `OSError`.
Target = int | Callable[[], tuple[str, int]]
#: A placeholder in requests: each request gets a new idempotency key.
KEY = "key-that-is-another-one-each-time"


@dataclass(frozen=True)
class Kind:
    """A client that repeats `request` and expects a response with one of `statuses`."""

    name: str
    request: bytes
    statuses: tuple[int, ...] = (200,)
    keeps_alive: bool = True
    #: The pause between two requests is random up to this.
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
    """Return a client that gets `path`; `pause` is its longest pause in seconds."""
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
    """Return a client that posts `body` as JSON; `pause` is its longest in seconds."""
    data = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: test",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
        f"Idempotency-Key: {KEY}",
    ]
    headers = "".join(f"{line}\r\n" for line in lines).encode()
    return Kind(name or f"POST {path}", headers + b"\r\n" + data, statuses, keeps_alive, pause)


_PAYMENT = {"amount": 1250, "currency": "EUR", "reference": "attack"}
GET = get("/", "GET")
GET_NEW = get("/", "GET, new connection", keeps_alive=False)
POST = post("/payments", _PAYMENT, "POST")
POST_NEW = post("/payments", _PAYMENT, "POST, new connection", keeps_alive=False)
#: A route of tests/fault_routes.py.
SLOW = get("/slow?seconds=2", "GET of 2 s")
#: All kinds of requests, with many POSTs: proxies do not retry those.
MIXED = 8 * [GET] + 3 * [GET_NEW] + 6 * [POST] + 4 * [POST_NEW] + 4 * [SLOW]


class Failure(NamedTuple):
    """A failed request; begin and end are values of `time.monotonic()`."""

    begin: float
    end: float
    kind: str
    reason: str
    host: str


@dataclass
class Result:
    """The outcome of all requests, which may be read while the load runs."""

    #: The number of responses by kind and status.
    responses: Counter[tuple[str, int]] = field(default_factory=Counter)
    #: Requests without a response, or with an unexpected status.
    failures: list[Failure] = field(default_factory=list)
    slowest_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The number of all requests, failed ones included."""
        without_response = sum(not each.reason.startswith("status") for each in self.failures)
        return self.responses.total() + without_response

    @property
    def failed(self) -> Counter[tuple[str, str]]:
        """The number of failed requests by kind and reason."""
        return Counter((each.kind, each.reason) for each in self.failures)

    def __str__(self) -> str:
        responses = {f"{kind}: {status}": n for (kind, status), n in sorted(self.responses.items())}
        failed = {f"{kind}: {reason}": n for (kind, reason), n in sorted(self.failed.items())}
        counts = f"{self.total} requests, {len(self.failures)} failed"
        return f"{counts} {failed}; responses {responses}"


class _ClosedError(Exception):
    """The server closed the connection before the end of the response."""


class _Client:
    def __init__(self, target: Target, kind: Kind, result: Result, stop: threading.Event) -> None:
        self.target = target
        self.kind = kind
        self.result = result
        self.stop = stop
        self.host = ""
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def run(self) -> None:
        """Send requests until `stop` is set, and finish the last one."""
        while not self.stop.is_set():
            begin = time.monotonic()
            reason = await self._attempt()
            end = time.monotonic()
            slowest = self.result.slowest_seconds.get(self.kind.name, 0.0)
            self.result.slowest_seconds[self.kind.name] = max(end - begin, slowest)
            pause_seconds = self.kind.pause_seconds
            if reason:
                failure = Failure(begin, end, self.kind.name, reason, self.host)
                self.result.failures.append(failure)
                pause_seconds = max(pause_seconds, FAILURE_PAUSE_SECONDS)
            await asyncio.sleep(random.uniform(0, pause_seconds))
        self._close()

    async def _attempt(self) -> str:
        """Send a request and count its response; return the reason of a failure, or ''."""
        try:
            async with asyncio.timeout(self.kind.timeout_seconds):
                status, body = await self._request()
        except (OSError, _ClosedError) as error:
            self._close()
            return _describe(error)
        self.result.responses[self.kind.name, status] += 1
        return "" if status in self.kind.statuses else f"status {status}: {_detail(body)}"

    async def _request(self) -> tuple[int, bytes]:
        """Return the status and the body of the response."""
        reader, writer = await self._connect()
        writer.write(self.kind.request.replace(KEY.encode(), uuid4().hex.encode()))
        try:
            headers = (await reader.readuntil(b"\r\n\r\n")).lower()
            body = await reader.readexactly(_content_length(headers))
        except asyncio.IncompleteReadError as error:
            place = "within the response" if error.partial else "before the response"
            msg = f"closed {place}"
            raise _ClosedError(msg) from None
        if not self.kind.keeps_alive or b"\r\nconnection: close\r\n" in headers:
            self._close()
        return int(headers[9:12]), body

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return the open connection, or a new one."""
        if self.streams is None:
            if isinstance(self.target, int):
                self.host = "127.0.0.1"
                port = self.target
            else:
                self.host, port = self.target()
            self.streams = await asyncio.open_connection(self.host, port)
        return self.streams

    def _close(self) -> None:
        if self.streams is not None:
            _, writer = self.streams
            writer.close()
            self.streams = None


def _content_length(headers: bytes) -> int:
    _, _, rest = headers.partition(b"\r\ncontent-length:")
    return int(rest.split(b"\r\n", 1)[0])


def _detail(body: bytes) -> str:
    """Return the detail of a problem (RFC 9457), or the beginning of another body."""
    try:
        return str(json.loads(body)["detail"])
    except (ValueError, TypeError, KeyError):
        return body[:100].decode(errors="replace")


def _describe(error: OSError | _ClosedError) -> str:
    """Return the reason of a failure in one or a few words."""
    match error:
        case _ClosedError():
            return str(error)
        case ConnectionRefusedError():
            return "refused"
        case TimeoutError():
            return "timeout"
        case ConnectionError():
            return "reset"
        case _:
            return f"{type(error).__name__}: {error.strerror}"


@contextlib.contextmanager
def load(target: Target, *clients: Sequence[Kind]) -> Iterator[Result]:
    """Run one client of each kind during the block; then wait for their last requests."""
    result = Result()
    stop = threading.Event()

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
