"""HTTP on one connection: uvicorn's protocol, with limits for the head of a request and one write for an answer."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app import master

#: For which a connection is read on, and what comes is forgotten, when it closes while the client still sends: the
#: system would reset it, and the client might lose the answer (RFC 9112, section 9.6).
LINGER_SECONDS = 2.0


class ServiceProtocol(HttpToolsProtocol):
    """One connection.

    What it refuses is answered by the app, so that it has an ID, an access line, and is counted. To the answer that is
    under way it stands for the transport (`write`, `close`, `is_closing`), and holds the head until there is a body:
    uvicorn writes the two one by one, and write(2) is the dearest part of a small answer (24.2 against 19.8 us).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = self.app_state["settings"]
        self.max_head_bytes = self.settings.max_header_bytes
        self.head_bytes = self.head_seconds = self.idle_seconds = 0
        self.held: bytes | None = None  # the head of the answer; empty when it is written
        self.is_deaf = False

    def data_received(self, data: bytes) -> None:
        """Parse, and refuse a head that grows over `MAX_HEADER_BYTES`."""
        if self.is_deaf:
            return
        self.head_bytes += len(data)
        super().data_received(data)
        if self.cycle is not None and self.cycle.scope is self.scope:  # it is complete
            self.head_bytes = 0
        elif self.head_bytes > self.max_head_bytes and self in self.connections:
            self.refuse(431)

    def on_headers_complete(self) -> None:
        """Start the request. From the drain on each answer says `Connection: close`."""
        self.head_seconds = 0
        if self.head_bytes > self.max_head_bytes:  # or it is the body that came with it
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > self.max_head_bytes:
                self.scope["state"]["refused"] = 431
        super().on_headers_complete()
        cycle = self.cycle
        if cycle is not None and cycle.scope is self.scope:  # else it is a WebSocket
            cycle.transport = self  # type: ignore[assignment]
            if master.is_draining() or self.server_state.is_retiring:  # type: ignore[attr-defined]
                cycle.keep_alive = False

    def write(self, data: bytes) -> None:
        """Write, or hold a head that announces a body's length; a stream's is written at once."""
        if self.held:
            data, self.held = self.held + data, b""
        elif self.held is None and not data.startswith(b"HTTP/1.1 100"):
            if b"\r\ncontent-length: " in data:
                self.held = data
                return
            self.held = b""
        self.transport.write(data)

    def close(self) -> None:
        """Close behind the answer; where the client still sends, tell it so first, and read on for a while."""
        if self.held:
            self.write(b"")
        if self.cycle.more_body and not self.transport.is_closing():
            self.is_deaf = True
            self.transport.write_eof()
            self.loop.call_later(LINGER_SECONDS, self.transport.close)
        else:
            self.transport.close()

    def is_closing(self) -> bool:
        """Tell whether nothing can be written any more."""
        return self.transport.is_closing()

    def on_response_complete(self) -> None:
        """Take the next request, unless the body of this one is still on its way: it could be endless.

        Uvicorn's own would set a timer for the idle connection each time; `check` is one for all of them.
        """
        self.server_state.total_requests += 1
        if self.held:  # the answer to HEAD has no body
            self.write(b"")
        self.held = None
        self.idle_seconds = 0
        if self.cycle.more_body:
            self.close()
        if not self.transport.is_closing():
            self.flow.resume_reading()
            if self.pipeline:
                self._start_asgi_task(*self.pipeline.pop())

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP."""
        self.refuse(400)

    def refuse(self, status: int) -> None:
        """Have the app answer with this status, and read no more."""
        self.is_deaf = True
        if self.scope is None:
            self.on_message_begin()
        self.scope["state"]["refused"] = status
        if self.cycle is None or self.cycle.response_complete:
            self.scope.update({"method": "_OTHER", "path": "", "raw_path": b"", "query_string": b""})
            self._start()
        else:  # in a body, or behind a request that is still being answered
            self.cycle.keep_alive = False
            self.cycle.message_event.set()

    def _start(self) -> None:
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
        self._start_asgi_task(self.cycle, self.app)

    def check(self) -> None:
        """Close what is idle for `KEEPALIVE_SECONDS`, refuse a head that takes too long; to be called once a second."""
        if self.is_deaf:
            return
        if self.cycle is None or self.cycle.scope is not self.scope:
            self.head_seconds += 1
            if self.head_seconds > self.settings.header_timeout_seconds:
                if self.scope is None:
                    self.transport.close()  # nothing was asked
                else:
                    self.refuse(408)
        elif self.cycle.response_complete:
            self.idle_seconds += 1
            if self.idle_seconds > self.settings.keepalive_seconds:
                self.transport.close()

    def leave(self) -> None:
        """Close behind the answer that is under way."""
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def end_stream(self) -> None:
        """Cut off an answer that has begun; it may be a stream, and never end."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            close = self.transport.abort if self.transport.get_write_buffer_size() else self.transport.close
            close()
