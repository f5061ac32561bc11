"""Limits of a worker: concurrency, body size and timeouts.

The middleware enforces them, so that a rejected request has an ID, an access line and a metric.
Uvicorn itself would read a body of 200 MB into memory, and its own limit of concurrency counts idle
connections and rejects probes.
"""

import asyncio
import sys
import time
from typing import Protocol

from starlette.types import Message, Receive, Scope

from app.errors import ServiceError, UnavailableError
from app.settings import Settings

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

    def time_out(self) -> None:
        """Cancel the handler and respond 504."""


class RejectedError(ServiceError):
    """A request that is not read to its end: one of `_DETAILS`; the connection is closed."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(_DETAILS[status], _HEADERS.get(status, _CLOSE))


class Limits:
    """The requests in flight in one worker, and their limits."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.max_in_flight = settings.max_in_flight
        self.max_body_bytes = settings.max_body_bytes
        self.probe_prefix = f"{settings.root_path}/health/"
        self.in_flight: dict[Exchange, None] = {}  # in the order of their start
        self.streams: set[Exchange] = set()
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
        if body_bytes > self.max_body_bytes:
            raise RejectedError(413)
        is_full = len(self.in_flight) >= self.max_in_flight
        if is_full and not scope["path"].startswith(self.probe_prefix):
            raise UnavailableError("The service is busy.")
        self.in_flight[exchange] = None
        if not self.is_expiry_scheduled:
            self._schedule_expiry()

    def start_stream(self, exchange: Exchange) -> None:
        """Count a request as a stream, and no longer as in flight. Called for each of its parts.

        Streams last, so they have a limit of their own: they must not use up `MAX_IN_FLIGHT`.
        """
        if not self.is_full_of_streams and exchange in self.in_flight:
            del self.in_flight[exchange]
            self.streams.add(exchange)
            self.is_full_of_streams = len(self.streams) >= self.max_streams

    def end_stream(self, exchange: Exchange) -> None:
        """Remove a request that is finished, if it is a stream."""
        if exchange in self.streams:
            self.streams.remove(exchange)
            self.is_full_of_streams = False

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
            if not is_streaming:
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

    def limit_receive(self, scope: Scope, receive: Receive) -> Receive:
        """Return a `receive` that enforces the limits of the body.

        It raises `RejectedError` for a body that is too large, too slow, or not valid HTTP.
        """
        size_bytes = 0
        deadline = time.monotonic() + self.settings.request_body_timeout_seconds
        is_complete = False

        async def limited() -> Message:
            nonlocal size_bytes, is_complete
            if is_complete:
                return await receive()
            seconds = None if self.is_debugged() else deadline - time.monotonic()
            try:
                async with asyncio.timeout(seconds):
                    message = await receive()
            except TimeoutError:
                raise RejectedError(408) from None
            size_bytes += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if size_bytes > self.max_body_bytes:
                raise RejectedError(413)
            if REJECTED_STATUS in scope["state"]:  # set by the protocol while it read the body
                raise RejectedError(scope["state"][REJECTED_STATUS])
            return message

        return limited
