"""One connection, as far as answers go: written at once, closed in order, cut off where they would never end."""

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

#: For which a connection is read on, and what comes is forgotten, when it closes while the client still sends: the
#: system would reset it, and the client might lose the answer (RFC 9112, section 9.6).
LINGER_SECONDS = 2.0


class HttpResponseProtocol(HttpToolsProtocol):
    """Uvicorn's protocol, which stands for the transport to the answer that is under way.

    It holds the head until there is a body: uvicorn writes the two one by one, and write(2) is the dearest part of a
    small answer (24.2 against 19.8 us).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.active_cycle: RequestResponseCycle | None = (
            None  # `cycle` is the newest, which may wait behind it
        )
        self.pending_headers: bytes | None = (
            None  # the head of the answer; empty when it is written
        )
        self.idle_seconds = 0
        self.discards_input = False  # what comes is not read any more

    def write(self, data: bytes) -> None:
        """Write, or hold a head that announces a body's length; a stream's is written at once."""
        if self.pending_headers:
            data, self.pending_headers = self.pending_headers + data, b""
        elif self.pending_headers is None and not data.startswith(b"HTTP/1.1 100"):
            if b"\r\ncontent-length: " in data:
                self.pending_headers = data
                return
            self.pending_headers = b""
        self.transport.write(data)

    def close(self) -> None:
        """Close behind the answer; where the client still sends, tell it so first, and read on for a while."""
        if self.pending_headers:
            self.write(b"")
        if (
            self.active_cycle is not None
            and self.active_cycle.more_body
            and not self.transport.is_closing()
        ):
            self.discards_input = True
            self.transport.write_eof()
            self.loop.call_later(LINGER_SECONDS, self.transport.close)
        else:
            self.transport.close()

    def is_closing(self) -> bool:
        """Tell whether nothing can be written any more."""
        return self.transport.is_closing()

    def on_response_complete(self) -> None:
        """Take the next request, unless the body of this one is still on its way: it could be endless.

        Uvicorn's own would set a timer for the idle connection each time; `HttpRequestProtocol.check` is one for all.
        """
        self.server_state.total_requests += 1
        if self.pending_headers:  # the answer to HEAD has no body
            self.write(b"")
        self.pending_headers = None
        self.idle_seconds = 0
        if self.active_cycle is not None and self.active_cycle.more_body:
            self.close()
        if not self.transport.is_closing():
            self.flow.resume_reading()
            if self.pipeline:
                self.active_cycle, app = self.pipeline.pop()
                self._start_asgi_task(self.active_cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the request that is answered, and forget those behind it."""
        super().connection_lost(exc)
        self.pipeline.clear()
        if self.active_cycle is not None and not self.active_cycle.response_complete:
            self.active_cycle.disconnected = True
            self.active_cycle.message_event.set()

    def close_after_response(self) -> None:
        """Close behind the answer that is under way."""
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def abort_unfinished(self) -> None:
        """Cut off an answer that has begun, which may be a stream and never end, and one that nobody reads."""
        cycle = self.active_cycle
        if cycle is not None and cycle.response_started:
            is_unread = self.transport.get_write_buffer_size() > 0
            if is_unread or not cycle.response_complete:
                self.abort()

    def abort(self) -> None:
        """Close at once; closing in order would wait for a client that does not read."""
        close = (
            self.transport.abort if self.transport.get_write_buffer_size() else self.transport.close
        )
        close()
