"""The response side of an HTTP connection: writing, closing, aborting."""

import contextvars
import fcntl
import struct
import termios
from collections.abc import Callable
from typing import Any

from uvicorn._types import ASGI3Application, ASGISendEvent
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
        #: The bytes of streams that were written, without those of short responses.
        self.stream_bytes = 0
        #: The bytes that the kernel had not yet accepted when they were last measured.
        self.undelivered_bytes = 0
        self.moved_bytes = 0
        #: Called with the undelivered bytes once a large response is with the kernel, or lost.
        self.report_delivery: Callable[[int], None] | None = None
        #: The context of the connection, a copy of which each request gets.
        self.context = contextvars.copy_context()

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
        else:
            self.stream_bytes += len(data)
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

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        """Run the application in a context of its own.

        By default a task copies the current one. For a pipelined request that is the context of
        the request before (PEP 567).
        """
        task = self.loop.create_task(cycle.run_asgi(app), context=self.context.copy())
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

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

    def when_delivered(self, report: Callable[[int], None]) -> None:
        """Call `report` with the bytes that the client did not receive of the latest response.

        That is when all of them are written but for 16 KiB, or when the connection is lost.
        """
        is_lost = self.parser is None
        if is_lost or not self.flow.write_paused:
            report(self.undelivered_bytes)
            return
        self.report_delivery = report
        self.undelivered_bytes = self.transport.get_write_buffer_size()

    def resume_writing(self) -> None:
        """Resume writing: all but 16 KiB of what was written is with the kernel."""
        super().resume_writing()
        self.idle_seconds = 0
        self.undelivered_bytes = 0
        self._report_delivery()

    def _report_delivery(self) -> None:
        report = self.report_delivery
        self.report_delivery = None
        if report is not None:
            report(self.undelivered_bytes)

    def _kernel_bytes(self) -> int:
        """Return the bytes that the kernel has not yet delivered, sent or not."""
        number = self.transport.get_extra_info("socket").fileno()
        (size,) = struct.unpack("i", fcntl.ioctl(number, termios.TIOCOUTQ, bytes(4)))
        return int(size)

    def has_undelivered_stream(self) -> bool:
        """Return whether the client has not received all that was written of an open stream.

        The events of a stream fit into the kernel's buffer for minutes. So a client that vanished
        without a word, or that does not read, is found there.
        """
        cycle = self.active_cycle
        if cycle is None or not cycle.response_started or cycle.response_complete:
            return False
        if self.transport.is_closing():
            return False
        if self._kernel_bytes():
            return True
        self.idle_seconds = 0
        return False

    def enforce_delivery(self, seconds: float) -> None:
        """Abort the connection if its client receives no byte during that many calls."""
        self.undelivered_bytes = self.transport.get_write_buffer_size()
        moved_bytes = self.stream_bytes - self.undelivered_bytes - self._kernel_bytes()
        if moved_bytes != self.moved_bytes:
            self.moved_bytes = moved_bytes
            self.idle_seconds = 0
            return
        self.idle_seconds += 1
        if self.idle_seconds > seconds:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Notify the request that is being served; drop the pipelined ones."""
        self._report_delivery()
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
            self.undelivered_bytes = self.transport.get_write_buffer_size()
            self.transport.abort()
        else:
            self.transport.close()

    def _is_receiving_body(self) -> bool:
        return self.active_cycle is not None and self.active_cycle.more_body


class Http10Cycle(RequestResponseCycle):
    """A request of HTTP/1.0, whose client knows no chunks (RFC 9112, section 6.1).

    A response of unknown length ends with the connection (RFC 9112, section 6.3).
    """

    has_length = True

    async def send(self, message: ASGISendEvent) -> None:
        """Send a message of the response: ASGI."""
        if message["type"] == "http.response.start":
            headers = message.get("headers", ())
            kept = [each for each in headers if each[0].lower() != b"transfer-encoding"]
            message["headers"] = kept
            self.has_length = any(name.lower() == b"content-length" for name, _ in kept)
            if not self.has_length:
                self.chunked_encoding = False
        elif message["type"] == "http.response.body" and not self.has_length:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)
