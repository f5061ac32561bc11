"""One connection, as far as answers go: written at once, closed in order, cut off where they would never end."""

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

#: For which a connection is read on, and what comes is forgotten, when it closes while the client still sends: the
#: system would reset it, and the client might lose the answer (RFC 9112, section 9.6).
LINGER_SECONDS = 2.0


class AnsweringProtocol(HttpToolsProtocol):
    """Uvicorn's protocol, which stands for the transport to the answer that is under way.

    It holds the head until there is a body: uvicorn writes the two one by one, and write(2) is the dearest part of a
    small answer (24.2 against 19.8 us).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.answering: RequestResponseCycle | None = None  # `cycle` is the newest, which may wait behind it
        self.held: bytes | None = None  # the head of the answer; empty when it is written
        self.idle_seconds = 0
        self.is_deaf = False  # what comes is not read any more

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
        if self.answering is not None and self.answering.more_body and not self.transport.is_closing():
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

        Uvicorn's own would set a timer for the idle connection each time; `ServiceProtocol.check` is one for all.
        """
        self.server_state.total_requests += 1
        if self.held:  # the answer to HEAD has no body
            self.write(b"")
        self.held = None
        self.idle_seconds = 0
        if self.answering is not None and self.answering.more_body:
            self.close()
        if not self.transport.is_closing():
            self.flow.resume_reading()
            if self.pipeline:
                self.answering, app = self.pipeline.pop()
                self._start_asgi_task(self.answering, app)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the request that is answered, and forget those behind it."""
        super().connection_lost(exc)
        self.pipeline.clear()
        if self.answering is not None and not self.answering.response_complete:
            self.answering.disconnected = True
            self.answering.message_event.set()

    def leave(self) -> None:
        """Close behind the answer that is under way."""
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def end_stream(self) -> None:
        """Cut off an answer that has begun, which may be a stream and never end, and one that nobody reads."""
        cycle = self.answering
        if cycle is not None and cycle.response_started:
            is_unread = self.transport.get_write_buffer_size() > 0
            if is_unread or not cycle.response_complete:
                self.cut()

    def cut(self) -> None:
        """Close at once; closing in order would wait for a client that does not read."""
        close = self.transport.abort if self.transport.get_write_buffer_size() else self.transport.close
        close()
