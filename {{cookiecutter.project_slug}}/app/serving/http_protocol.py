"""The request side of an HTTP connection: limits for its headers, and rejections.

A rejected request goes through the application, which responds to it. So it has a request ID, an
access line and a metric.
"""

import asyncio
from collections import deque
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from app.serving import shared_flags
from app.serving.http_response import Http10Cycle, HttpResponseProtocol
from app.serving.state import ServiceState
from app.serving.websocket_protocol import ServiceWebSocket, requests_websocket
from app.web.limits import REJECTED_STATUS
from app.web.proxies import client_address

#: Pipelined requests that may wait for the one being served. Each uses memory before any limit
#: counts it.
MAX_PIPELINED = 8
#: Receives the trailers of a request: fields after the body, which nothing has validated
#: (RFC 9110, section 6.5.1).
DISCARD: deque[tuple[bytes, bytes]] = deque(maxlen=0)


class HttpRequestProtocol(HttpResponseProtocol):
    """One HTTP connection. `ServiceServer` calls `enforce_timeouts` once a second.

    uvicorn makes a `scope` when a request begins and a `cycle` with that scope when its headers
    are complete.
    """

    server_state: ServiceState

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = self.server_state.settings
        self.max_header_bytes = self.settings.max_header_bytes
        # The size of incomplete headers. The read in which they begin may start with the body of
        # the request before; the reads after it contain nothing else.
        self.first_read_bytes = 0
        self.header_bytes = 0
        self.header_seconds = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection; a client of IPv4 has an IPv4 address, also on a socket of IPv6."""
        super().connection_made(transport)
        self.client = client_address(self.client)

    @property
    def has_complete_headers(self) -> bool:
        """Whether the headers of the newest request are complete; never true for a WebSocket."""
        return self.cycle is not None and self.cycle.scope is self.scope

    @property
    def is_between_requests(self) -> bool:
        """Whether no request is partly read: none has begun since the last complete headers."""
        return self.scope is None or self.has_complete_headers

    def data_received(self, data: bytes) -> None:
        """Parse a read; reject headers that grow over `MAX_HEADER_BYTES`."""
        if self.discards_input:
            return
        scope_before = self.scope
        self.header_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            (headers_end,) = upgrade.args
            self._handle_upgrade(data[headers_end:])
        except httptools.HttpParserError:  # the input is not HTTP
            self.reject(400)
        if self.has_complete_headers:
            self.header_bytes = 0
            self.first_read_bytes = 0
        elif self.scope is not scope_before:
            self.header_bytes = 0
            self.first_read_bytes = len(data)
        elif self.header_bytes > self.max_header_bytes and self in self.connections:
            self.reject(431)

    def _should_upgrade(self) -> bool:
        """Have the parser stop after the headers of every request with an upgrade."""
        return True

    def _handle_upgrade(self, rest: bytes) -> None:
        """Switch to WebSocket, or ignore the upgrade (RFC 9110, section 7.8).

        An upgrade cannot overtake a response that is due: it is ignored too.
        """
        is_idle = self.cycle is None or self.cycle.response_complete
        if self.scope["method"] == "CONNECT":  # not a request for a resource of this server
            self.reject(501)
        elif REJECTED_STATUS in self.scope["state"]:
            self.reject(self.scope["state"][REJECTED_STATUS])
        elif not (is_idle and requests_websocket(self.scope)):
            self._serve_without_upgrade(rest)
        else:
            self._handle_handshake(rest)

    def _handle_handshake(self, rest: bytes) -> None:
        websocket = ServiceWebSocket(self.config, self.server_state, self.app_state)
        status = websocket.negotiate(self.scope)
        if status != 101:
            self._serve_without_upgrade(rest, status)
            return
        self.connections.discard(self)
        websocket.connection_made(self.transport)
        self.context.copy().run(websocket.start, self.scope, self.url)
        self.transport.set_protocol(websocket)
        if rest:
            websocket.data_received(rest)

    def _serve_without_upgrade(self, rest: bytes, rejected_status: int | None = None) -> None:
        """Parse the request again without its `Upgrade`, since the parser has skipped its body."""
        scope = self.scope
        lines = [
            f"{scope['method']} ".encode(),
            self.url,
            f" HTTP/{scope['http_version']}".encode(),
        ]
        for name, value in scope["headers"]:
            if name != b"upgrade":
                lines += [b"\r\n", name, b": ", value]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self.data_received(b"".join([*lines, b"\r\n\r\n"]))
        if self.discards_input:
            return
        if rejected_status is not None:
            self.scope["state"][REJECTED_STATUS] = rejected_status
        if rest:
            self.data_received(rest)

    def on_headers_complete(self) -> None:
        """Start the request. While shutting down, the response has `Connection: close`.

        Raises `ValueError` for too many pipelined requests: the parser stops, which rejects the
        request with 400.
        """
        if len(self.pipeline) >= MAX_PIPELINED:
            msg = "too many pipelined requests"
            raise ValueError(msg)
        self.header_seconds = 0
        # Reads may contain bodies too: measure the headers only if the reads exceed the limit.
        read_bytes = self.header_bytes + self.first_read_bytes
        if read_bytes > self.max_header_bytes and self._measure_headers() > self.max_header_bytes:
            self.scope["state"][REJECTED_STATUS] = 431
        super().on_headers_complete()
        if self.has_complete_headers:
            self._prepare_response(self.cycle)

    def _measure_headers(self) -> int:
        """Return the bytes of the target and of the fields, each with `: ` and a line end."""
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _prepare_response(self, cycle: RequestResponseCycle) -> None:
        cycle.transport = self  # type: ignore[assignment]
        self.headers = DISCARD  # type: ignore[assignment]
        if not self.pipeline:
            self.active_cycle = cycle
        if not cycle.keep_alive and self.scope["http_version"] == "1.0":
            cycle.__class__ = Http10Cycle
            cycle.waiting_for_100_continue = False  # RFC 9110, section 10.1.1
        if shared_flags.is_draining() or self.server_state.is_retiring:
            cycle.keep_alive = False

    def reject(self, status: int) -> None:
        """Respond with this status after the responses that are due, and read no more."""
        self.discards_input = True
        if self.cycle is None or self.cycle.response_complete:
            self._start_rejection(status)
            return
        self.cycle.keep_alive = False
        is_receiving_body = self.has_complete_headers and self.cycle.more_body
        if is_receiving_body:  # its `receive` raises the rejection
            self.scope["state"][REJECTED_STATUS] = status
            self.cycle.message_event.set()

    def _start_rejection(self, status: int) -> None:
        """Have the application respond to the partly read request, or an empty one."""
        if self.is_between_requests:
            self.on_message_begin()
        self.scope["state"][REJECTED_STATUS] = status
        self.scope.update({"method": "_OTHER", "path": "", "raw_path": b"", "query_string": b""})
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
        """Close an idle connection; reject headers that arrive too slowly with 408.

        To be called once a second: it counts its calls. A connection over which a response moves
        is not idle.
        """
        if self.transport.get_write_buffer_size() or self.has_undelivered_stream():
            self.enforce_delivery(self.settings.keepalive_seconds)
        elif self.discards_input:
            return
        elif not self.has_complete_headers:
            self._enforce_header_timeout()
        elif self.cycle.response_complete:
            self._enforce_keepalive()

    def _enforce_header_timeout(self) -> None:
        self.header_seconds += 1
        if self.header_seconds <= self.settings.header_timeout_seconds:
            return
        if self.scope is None:
            self.transport.close()  # the client has requested nothing
        else:
            self.reject(408)

    def _enforce_keepalive(self) -> None:
        self.idle_seconds += 1
        if self.idle_seconds > self.settings.keepalive_seconds:
            self.abort()
