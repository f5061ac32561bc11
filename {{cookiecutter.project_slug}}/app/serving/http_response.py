"""The response side of an HTTP connection: writing, closing, aborting."""

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app.web.limits import CLIENT_LEFT

#: Seconds for which a closing connection is still read, and its input discarded, while the client
#: sends. Otherwise the kernel resets the connection, and the client may lose the response
#: (RFC 9112, section 9.6).
LINGER_SECONDS = 2.0


class HttpResponseProtocol(HttpToolsProtocol):
    """Uvicorn's protocol, and the transport to which the cycle of a response writes.

    uvicorn writes headers and body one by one, and write(2) is the most expensive part of a small
    response. Here the headers wait for the body: 19.8 us instead of 24.2.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: The request that is being served; `cycle` is the newest, which may wait behind it.
        self.active_cycle: RequestResponseCycle | None = None
        #: The headers that wait for the body: None before them, empty once they are written.
        self.pending_headers: bytes | None = None
        self.idle_seconds = 0
        self.discards_input = False

    def write(self, data: bytes) -> None:
        """Write, or keep headers with a Content-Length until their body is written.

        The headers of a stream are written at once.
        """
        if self.pending_headers:
            data = self.pending_headers + data
            self.pending_headers = b""
        elif self.pending_headers is None and not data.startswith(b"HTTP/1.1 100"):
            if b"\r\ncontent-length: " in data:
                self.pending_headers = data
                return
            self.pending_headers = b""
        self.transport.write(data)

    def close(self) -> None:
        """Close after the response. If the client still sends, discard its input for a while."""
        if self.pending_headers:
            self.write(b"")
        if self._is_receiving_body() and not self.transport.is_closing():
            self.discards_input = True
            self.transport.write_eof()
            self.loop.call_later(LINGER_SECONDS, self.transport.close)
        else:
            self.transport.close()

    def is_closing(self) -> bool:
        """Return whether nothing can be written any more."""
        return self.transport.is_closing()

    def on_response_complete(self) -> None:
        """Start the next request; close if the body of this one is still arriving.

        Such a body can be endless. uvicorn's method sets a timer for each idle connection;
        `HttpRequestProtocol.enforce_timeouts` is one timer for all.
        """
        self.server_state.total_requests += 1
        if self.pending_headers:  # a response to HEAD has no body
            self.write(b"")
        self.pending_headers = None
        self.idle_seconds = 0
        if self._is_receiving_body():
            self.close()
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self.active_cycle, app = self.pipeline.pop()
            self._start_asgi_task(self.active_cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        """Notify the request that is being served; drop the pipelined ones."""
        super().connection_lost(exc)
        self.pipeline.clear()
        if self.active_cycle is not None and not self.active_cycle.response_complete:
            self.active_cycle.disconnected = True
            self.active_cycle.message_event.set()
            if not self.active_cycle.response_started:
                self.active_cycle.scope["state"][CLIENT_LEFT] = True

    def close_after_response(self) -> None:
        """Close the connection after the newest request has its response."""
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def withdraw_response(self, cycle: RequestResponseCycle) -> bool:
        """Discard the response of a failed request if nothing is written; return whether it was.

        Otherwise close, before the end of the response.
        """
        if cycle is not self.active_cycle or cycle.disconnected or cycle.response_complete:
            return False
        is_written = self.pending_headers == b""
        if is_written:
            cycle.disconnected = True  # uvicorn would log the error again
            self.close()
            return False
        self.pending_headers = None
        cycle.response_started = False
        cycle.chunked_encoding = None
        cycle.expected_content_length = 0
        return True

    def abort_unfinished(self) -> None:
        """Abort a response that has begun but is incomplete or unread.

        Such as a stream that never ends.
        """
        cycle = self.active_cycle
        if cycle is None or not cycle.response_started:
            return
        is_unread = self.transport.get_write_buffer_size() > 0
        if is_unread or not cycle.response_complete:
            self.abort()

    def abort(self) -> None:
        """Close at once, without waiting for a client that does not read."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def _is_receiving_body(self) -> bool:
        return self.active_cycle is not None and self.active_cycle.more_body
