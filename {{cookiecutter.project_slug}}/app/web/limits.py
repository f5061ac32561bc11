"""What a worker takes on: how many requests at once, how large, and for how long.

observe.py asks here, so that each refusal carries the request's ID, is logged and counted. Uvicorn itself would read a
body of 200 MB into memory, and its own limit on concurrency counts idle connections and refuses probes.
"""

import asyncio
import time
from typing import Protocol

from starlette.types import Message, Receive, Scope

from app.errors import ServiceError, UnavailableError
from app.settings import Settings

_EXPIRY_SECONDS = 0.5
#: Key of `scope["state"]` by which the protocol tells the middleware to reject a request with this status.
REJECTED_STATUS = "rejected_status"
_CLOSE = {"Connection": "close"}
_DETAILS = {
    400: "This is not a valid HTTP request.",
    408: "The request did not arrive in time.",
    413: "The body of the request is too large.",
    431: "The header fields of the request are too large.",
}


class Exchange(Protocol):
    """What is limited: one request and its answer."""

    scope: Scope
    start: float
    status: int

    def time_out(self) -> None:
        """Answer 504."""


class RejectedError(ServiceError):
    """A request, or its body, that is not read to its end: 400, 408, 413 or 431; the connection is closed."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(_DETAILS[status], _CLOSE)


class Limits:
    """The requests of one worker that have no whole answer yet, and the bounds that they keep to."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.max_in_flight, self.max_body_bytes = settings.max_in_flight, settings.max_body_bytes
        self.probes = f"{settings.root_path}/health/"
        self.in_flight: dict[Exchange, None] = {}  # in the order of their start
        self.is_expiry_scheduled = False

    def admit(self, exchange: Exchange, body_bytes: int) -> None:
        """Count a request in, to be ended after `REQUEST_TIMEOUT_SECONDS`; `body_bytes` is 0 where it is not known.

        Raises `ServiceError` for a request that is not to be served.
        """
        scope = exchange.scope
        if REJECTED_STATUS in scope["state"]:
            raise RejectedError(scope["state"][REJECTED_STATUS])
        if body_bytes > self.max_body_bytes:
            raise RejectedError(413)
        if len(self.in_flight) >= self.max_in_flight and not scope["path"].startswith(self.probes):
            raise UnavailableError("The service is busy.")
        self.in_flight[exchange] = None
        if not self.is_expiry_scheduled:
            self.is_expiry_scheduled = True
            asyncio.get_running_loop().call_later(_EXPIRY_SECONDS, self._expire_requests)

    def _expire_requests(self) -> None:
        """Time out what has waited too long: one timer for all, since one for each would cost each of them."""
        too_old = time.perf_counter() - self.settings.request_timeout_seconds
        for exchange in list(self.in_flight):
            if exchange.start > too_old:
                break
            if not exchange.status:  # else it is a stream
                exchange.time_out()
        self.is_expiry_scheduled = bool(self.in_flight)
        if self.is_expiry_scheduled:
            asyncio.get_running_loop().call_later(_EXPIRY_SECONDS, self._expire_requests)

    def limit_receive(self, scope: Scope, receive: Receive) -> Receive:
        """Return a `receive` that raises `RejectedError` for a body that is too large, too slow, or broken."""
        size, deadline, is_complete = (
            0,
            time.monotonic() + self.settings.request_body_timeout_seconds,
            False,
        )

        async def bounded() -> Message:
            nonlocal size, is_complete
            if is_complete:
                return await receive()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise RejectedError(408) from None
            size += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if size > self.max_body_bytes:
                raise RejectedError(413)
            if REJECTED_STATUS in scope["state"]:  # the protocol could not parse it
                raise RejectedError(scope["state"][REJECTED_STATUS])
            return message

        return bounded
