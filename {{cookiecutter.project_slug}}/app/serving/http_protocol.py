"""One connection, as far as requests go: limits for their heads, and refusals that are answers like any other."""

import asyncio
from collections import deque
from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from app.serving import shared_flags
from app.serving.http_response import HttpResponseProtocol
from app.web.limits import REJECTED_STATUS

#: Requests that may wait behind the one that is answered: each costs memory before it is counted anywhere.
MAX_PIPELINED = 8
#: Where fields behind a body go: nobody has checked them (RFC 9110, section 6.5.1).
DISCARD: deque[tuple[bytes, bytes]] = deque(maxlen=0)


class HttpRequestProtocol(HttpResponseProtocol):
    """What it refuses is answered by the app, so that it has an ID, an access line, and is counted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = self.app_state["settings"]
        self.max_head_bytes = self.settings.max_header_bytes
        self.head_bytes = self.first_bytes = self.head_seconds = 0

    def data_received(self, data: bytes) -> None:
        """Parse, and refuse a head that grows over `MAX_HEADER_BYTES`."""
        if self.discards_input:
            return
        scope = self.scope
        self.head_bytes += len(data)
        super().data_received(data)
        if self.cycle is not None and self.cycle.scope is self.scope:  # it is complete
            self.head_bytes = self.first_bytes = 0
        elif self.scope is not scope:  # it has begun in this read, of which the rest may be a body
            self.head_bytes, self.first_bytes = 0, len(data)
        elif self.head_bytes > self.max_head_bytes and self in self.connections:
            self.reject(431)

    def on_headers_complete(self) -> None:
        """Start the request. From the drain on each answer says `Connection: close`."""
        if len(self.pipeline) >= MAX_PIPELINED:
            msg = "too many requests wait for their answers"
            raise ValueError(msg)  # the parser stops, and `send_400_response` follows
        self.head_seconds = 0
        if (
            self.head_bytes + self.first_bytes > self.max_head_bytes
        ):  # or it is the body that came with it
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > self.max_head_bytes:
                self.scope["state"][REJECTED_STATUS] = 431
        super().on_headers_complete()
        cycle = self.cycle
        if cycle is not None and cycle.scope is self.scope:  # else it is a WebSocket
            cycle.transport = self  # type: ignore[assignment]
            self.headers = DISCARD  # type: ignore[assignment]
            if not self.pipeline:
                self.active_cycle = cycle
            if shared_flags.is_draining() or self.server_state.is_retiring:  # type: ignore[attr-defined]
                cycle.keep_alive = False

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP."""
        self.reject(400)

    def reject(self, status: int) -> None:
        """Have the app answer with this status, and read no more."""
        self.discards_input = True
        if self.cycle is None or self.cycle.response_complete:
            if self.scope is None or (self.cycle is not None and self.cycle.scope is self.scope):
                self.on_message_begin()
            self.scope["state"][REJECTED_STATUS] = status
            self.scope.update(
                {"method": "_OTHER", "path": "", "raw_path": b"", "query_string": b""}
            )
            self._start_rejection()
            return
        self.cycle.keep_alive = False  # behind what is still being answered
        if self.cycle.scope is self.scope and self.cycle.more_body:
            self.scope["state"][REJECTED_STATUS] = status
            self.cycle.message_event.set()

    def _start_rejection(self) -> None:
        self.cycle = RequestResponseCycle(
            scope=self.scope,
            transport=self,  # type: ignore[arg-type]
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=False,
            on_response=self.on_response_complete,
        )
        self.active_cycle = self.cycle
        self._start_asgi_task(self.cycle, self.app)

    def enforce_timeouts(self) -> None:
        """Close what is idle for `KEEPALIVE_SECONDS`, refuse a head that takes too long; to be called once a second."""
        if self.discards_input:
            return
        if self.cycle is None or self.cycle.scope is not self.scope:
            self.head_seconds += 1
            if self.head_seconds > self.settings.header_timeout_seconds:
                if self.scope is None:
                    self.transport.close()  # nothing was asked
                else:
                    self.reject(408)
        elif self.cycle.response_complete:
            self.idle_seconds += 1
            if self.idle_seconds > self.settings.keepalive_seconds:
                self.abort()
