"""Limits of a worker: concurrency, body size and timeouts.

The middleware enforces them, so that a rejected request has an ID, an access line and a metric.
Uvicorn itself would read a body of 200 MB into memory, and its own limit of concurrency counts idle
connections and rejects probes.
"""

import asyncio
import sys
import time
from collections.abc import Sequence
from typing import Protocol

from starlette.routing import BaseRoute
from starlette.types import Message, Receive, Scope

from app.errors import ServiceError, UnavailableError
from app.settings import Settings
from app.web.body_limit import SMALL_BYTES, BodyLimits

#: How often requests are checked against `REQUEST_TIMEOUT_SECONDS`.
EXPIRY_SECONDS = 0.5
#: The key of `scope["state"]` with which the protocol has a request rejected: its value is the
#: status of the response.
REJECTED_STATUS = "rejected_status"
#: The key with which the protocol reports a client that has disconnected before the response.
CLIENT_LEFT = "client_left"
#: Modules of debuggers: bdb is the base of pdb and others, pydevd is the one of editors.
DEBUGGERS = ("bdb", "pydevd")
_DETAILS = {
    400: "The request is not valid HTTP.",
    408: "The request did not arrive in time.",
    413: "The request body is too large.",
    426: "The WebSocket version is not supported.",
    431: "The request headers are too large.",
    501: "The request needs something that this server does not implement.",
}
_CLOSE = {"Connection": "close"}
_HEADERS = {
    # RFC 6455, section 4.4, and RFC 9110, section 15.5.22
    426: {"Sec-WebSocket-Version": "13", "Upgrade": "websocket", "Connection": "Upgrade, close"}
}


class Exchange(Protocol):
    """One request and its response, as far as the limits need it."""

    scope: Scope
    start: float
    status: int
    kind: str
    opened_seconds: float
    extra_seconds: float
    is_buffered: bool

    def time_out(self) -> None:
        """Cancel the handler and respond 504."""


class RejectedError(ServiceError):
    """A request that is not read to its end: one of `_DETAILS`; the connection is closed."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(_DETAILS[status], _HEADERS.get(status, _CLOSE))


class Limits:
    """The requests in flight in one worker, and their limits."""

    def __init__(self, settings: Settings, routes: Sequence[BaseRoute]) -> None:
        self.settings = settings
        self.bodies = BodyLimits(settings, routes)
        self.max_in_flight = settings.max_in_flight
        self.max_body_bytes = settings.max_body_bytes
        self.probe_prefix = f"{settings.root_path}/health/"
        self.in_flight: dict[Exchange, None] = {}  # in the order of their start
        self.streams: set[Exchange] = set()
        #: The bytes of large bodies that are in memory or in temporary files.
        self.buffered: dict[Exchange, int] = {}
        #: The number of streams by kind, for the metrics.
        self.stream_counts = {"stream": 0, "download": 0, "websocket": 0}
        self.max_streams = settings.max_streams
        self.is_full_of_streams = False
        self.is_expiry_scheduled = False
        self.is_development = settings.environment == "development"

    def admit(self, exchange: Exchange, body_bytes: int) -> None:
        """Add a request to those in flight; `body_bytes` is 0 if its length is not known.

        Raises `RejectedError` for a request that the protocol rejects or whose body is too large,
        `UnavailableError` at the limit of concurrency. Probes are always admitted.
        """
        scope = exchange.scope
        if REJECTED_STATUS in scope["state"]:
            raise RejectedError(scope["state"][REJECTED_STATUS])
        if body_bytes > self.max_body_bytes and body_bytes > self.bodies.find(scope).max_bytes:
            raise RejectedError(413)
        is_full = len(self.in_flight) >= self.max_in_flight
        if is_full and not self.is_probe(scope):
            raise UnavailableError("The service is busy.")
        self.in_flight[exchange] = None
        if not self.is_expiry_scheduled:
            self._schedule_expiry()

    def is_probe(self, scope: Scope) -> bool:
        """Return whether a request is for a probe, by its path."""
        path: str = scope["path"]
        return path.startswith(self.probe_prefix)

    def start_stream(self, exchange: Exchange) -> None:
        """Count a request as a stream, and no longer as in flight. Called for each of its parts.

        Streams last, so they have a limit of their own: they must not use up `MAX_IN_FLIGHT`.
        """
        if not self.is_full_of_streams and exchange in self.in_flight:
            del self.in_flight[exchange]
            self.streams.add(exchange)
            self.stream_counts[exchange.kind] += 1
            self.is_full_of_streams = len(self.streams) >= self.max_streams
            exchange.opened_seconds = time.perf_counter() - exchange.start

    def end_stream(self, exchange: Exchange) -> bool:
        """Remove a request that is finished; return whether it is a stream."""
        if exchange not in self.streams:
            return False
        self.streams.remove(exchange)
        self.stream_counts[exchange.kind] -= 1
        self.is_full_of_streams = False
        return True

    def __len__(self) -> int:
        """Return the number of requests that are being served, streams included."""
        return len(self.in_flight) + len(self.streams)

    def _schedule_expiry(self) -> None:
        self.is_expiry_scheduled = True
        asyncio.get_running_loop().call_later(EXPIRY_SECONDS, self._expire_requests)

    def _expire_requests(self) -> None:
        """Time out the requests that exceed their limit. One timer serves all requests."""
        oldest_start = time.perf_counter() - self.settings.request_timeout_seconds
        if self.is_debugged():
            oldest_start = float("-inf")
        for exchange in list(self.in_flight):
            if exchange.start > oldest_start:
                break
            is_streaming = exchange.status != 0
            if not is_streaming and exchange.start + exchange.extra_seconds <= oldest_start:
                exchange.time_out()
        self.is_expiry_scheduled = False
        if self.in_flight:
            self._schedule_expiry()

    def is_debugged(self) -> bool:
        """Return whether a developer may be at a breakpoint; then requests have no time limit.

        A debugger is detected by its modules: a trace function belongs to one thread, and coverage
        sets one too.
        """
        return self.is_development and any(name in sys.modules for name in DEBUGGERS)

    def limit_receive(self, exchange: Exchange, receive: Receive, body_bytes: int) -> Receive:
        """Return a `receive` that enforces the limits of the body.

        `body_bytes` is 0 if the length is not known. It raises `RejectedError` for a body that is
        too large, too slow, or not valid HTTP.
        """
        size_bytes = 0
        deadline = 0.0
        max_bytes = -1
        is_complete = False
        server = getattr(receive, "__self__", None)

        async def limited() -> Message:
            nonlocal size_bytes, deadline, max_bytes, is_complete
            if is_complete:
                return await receive()
            if max_bytes < 0:  # only now is the request routed
                max_bytes, seconds = self._start_body(exchange, body_bytes)
                deadline = time.monotonic() + seconds
            if getattr(server, "more_body", True):
                message = await self._receive_until(deadline, receive)
            else:  # the server has all of it
                message = await receive()
            size_bytes += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if size_bytes > max_bytes:
                raise RejectedError(413)
            if size_bytes > SMALL_BYTES:
                self._buffer(exchange, size_bytes)
            if REJECTED_STATUS in exchange.scope["state"]:  # set by the protocol in the meantime
                raise RejectedError(exchange.scope["state"][REJECTED_STATUS])
            return message

        return limited

    async def _receive_until(self, deadline: float, receive: Receive) -> Message:
        """Return the next part of a body. Raises `RejectedError` if it does not arrive in time."""
        seconds_left = None if self.is_debugged() else deadline - time.monotonic()
        try:
            async with asyncio.timeout(seconds_left):
                return await receive()
        except TimeoutError:
            raise RejectedError(408) from None

    def _start_body(self, exchange: Exchange, body_bytes: int) -> tuple[int, float]:
        """Return the size and time limit of a body whose route is known.

        Raises `RejectedError` if the declared length exceeds it, `UnavailableError` if there is no
        space for it.
        """
        limit = self.bodies.find(exchange.scope)
        if body_bytes > limit.max_bytes:
            raise RejectedError(413)
        if not limit.is_streamed:
            exchange.is_buffered = True
            if body_bytes > SMALL_BYTES:
                self._buffer(exchange, body_bytes)
        if limit.seconds is None:
            return limit.max_bytes, self.settings.request_body_timeout_seconds
        exchange.extra_seconds = limit.seconds
        return limit.max_bytes, limit.seconds

    def _buffer(self, exchange: Exchange, size_bytes: int) -> None:
        """Count the bytes of a large body until its request has ended.

        Raises `UnavailableError` if there is no space for it.
        """
        counted_bytes = self.buffered.get(exchange, 0)
        if not exchange.is_buffered or size_bytes <= counted_bytes:
            return
        others = sum(self.buffered.values()) - counted_bytes
        if others + size_bytes > self.settings.max_buffered_bytes:
            raise UnavailableError("The service receives too many large bodies.")
        self.buffered[exchange] = size_bytes
