"""The outermost ASGI middleware: it wraps the finished application, and every request.

The handshake of a WebSocket is a request too.

In this order:

1. parse the headers: request ID, trace, length of the body
2. enforce the limits, or reject the request
3. run the application, behind proxy headers if there are any
4. turn an error into a problem response: a rejection, a timeout, a shutdown, a bug
5. when the response is sent, or the client has disconnected: metrics, access log, trace

One middleware and not five: fused they keep 0.88 of bare FastAPI's throughput, separate ones
0.54-0.60.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect
from uvicorn.protocols.utils import ClientDisconnected

from app.errors import ServiceError, UnavailableError
from app.lifecycle import Lifecycle
from app.settings import Settings
from app.telemetry import tracing
from app.telemetry.access_log import AccessLog
from app.telemetry.context import request_context
from app.telemetry.http_metrics import HttpMetrics
from app.telemetry.logs import redact, truncate
from app.telemetry.tracing import RequestSpan
from app.web.cors import add_missing_headers
from app.web.head import serve_head
from app.web.headers import generate_request_ids, parse_headers
from app.web.limits import CLIENT_LEFT, Limits
from app.web.problems import http_problem, log_cause, problem
from app.web.proxies import with_proxy_headers
from app.web.routes import is_mounted, route_template
from app.web.threads import cancel_after_thread

#: RFC 9110 and RFC 5789. Others are counted as `_OTHER`, or clients could invent time series.
_METHODS = frozenset(
    {"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"}
)
#: The fields that this service and the server set, once each (RFC 9110, section 5.3).
_SERVER_FIELDS = frozenset({b"date", b"x-request-id"})
#: The fields of a response that are looked at. One look-up passes over the others.
_NOTED_FIELDS = _SERVER_FIELDS | {b"content-length"}
#: Maximum size of a path in an access line, in bytes of UTF-8.
MAX_PATH_BYTES = 1024
#: A path of at most this many characters is not larger: each has up to four bytes.
SHORT_PATH = MAX_PATH_BYTES // 4
#: RFC 9110, section 15.2.2.
SWITCHING_PROTOCOLS = 101
#: nginx's status for a client that disconnected before the response.
CLIENT_CLOSED_REQUEST = 499
#: The seconds for which an application may go on to stream to a client that has left.
UNHEARD_SECONDS = 1.0
TOO_MANY_STREAMS = "The service has too many streams."
#: The bytes of a response from which on its access line waits until the client has received it:
#: the default limit of a transport's buffer (asyncio, `set_write_buffer_limits`).
LARGE_RESPONSE_BYTES = 1 << 16
#: The close code of a WebSocket whose handler failed (RFC 6455, section 7.4.1).
INTERNAL_ERROR = 1011
#: The close code of a WebSocket whose handler has ended (RFC 6455, section 7.4.1).
NORMAL_CLOSURE = 1000
#: The code of a connection that was lost: never sent (RFC 6455, section 7.4.1).
ABNORMAL_CLOSURE = 1006
#: The client has disconnected: Starlette's errors, and uvicorn's for a WebSocket.
_DISCONNECTS = (ClientDisconnect, WebSocketDisconnect, ClientDisconnected)

logger = logging.getLogger("app.observe")


class RequestMiddleware:
    """Handles each request as an `Exchange`, each WebSocket as a `Handshake`.

    `cors` is the application's middleware for CORS, if it has one. Its headers are added to the
    responses that it has not seen, such as rejections.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        lifecycle: Lifecycle,
        router: Router,
        cors: CORSMiddleware | None = None,
    ) -> None:
        self.app = app
        self.router = router
        self.lifecycle = lifecycle
        self.cors = cors
        self.app_with_proxy_headers = with_proxy_headers(app, settings.forwarded_allow_ips)
        self.limits = Limits(settings, router.routes)
        self.metrics = HttpMetrics(settings, self.limits, self.limits.stream_counts)
        self.access_log = AccessLog(settings, self.metrics.dropped_lines.inc)
        self.request_ids = generate_request_ids()

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Handle requests and WebSockets; pass the lifespan through.

        Returns the coroutine unawaited, which saves one frame per request.
        """
        if scope["type"] == "http":
            return Exchange(self, scope, receive, send).serve()
        if scope["type"] == "websocket":
            return Handshake(self, scope, receive, send).serve()
        return self._pass_through(scope, receive, send)

    async def _pass_through(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app_with_proxy_headers(scope, receive, send)
        finally:
            if scope["type"] == "lifespan":  # shutdown: no more requests
                self.metrics.flush()
                self.access_log.close()


class Exchange:
    """One request and its response: HTTP's own term (RFC 9110, section 3.4)."""

    #: The kind of stream that it may become. A download is a response of known length in parts.
    kind = "download"
    #: The seconds until it became a stream.
    opened_seconds = 0.0
    #: When a stream has noticed that its client had left.
    left_at = 0.0
    #: The seconds for which its body may be received, if its route has a limit of its own.
    extra_seconds = 0.0
    #: Whether the handler keeps the whole body.
    is_buffered = False
    #: Its span, if it is sampled; probes have none.
    span: RequestSpan | None = None
    #: The class of the unhandled exception.
    bug = ""

    def __init__(
        self, middleware: RequestMiddleware, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self.start = time.perf_counter()
        self.middleware = middleware
        self.scope = scope
        self.receive = receive
        self._send = send
        self.status = 0
        self.size_bytes = 0
        self.is_finished = False
        self.timeout_response: asyncio.Task[None] | None = None

    async def serve(self) -> None:
        """Run the application; respond in its place if it raises."""
        parsed = parse_headers(self.scope, self.middleware.request_ids)
        self.context, body_bytes, is_forwarded = parsed
        if tracing.current is not None and not self.middleware.limits.is_probe(self.scope):
            self.span = tracing.current.start_request(self.scope, self.context)
        request_context.set(self.context)
        self.task = asyncio.current_task()
        try:
            receive = self._admit(body_bytes)
            middleware = self.middleware
            app = middleware.app_with_proxy_headers if is_forwarded else middleware.app
            if self.scope["method"] == "HEAD":
                await serve_head(app, middleware.router, self.scope, receive, self.send)
            else:
                await app(self.scope, receive, self.send)
            if not self.is_finished:
                await self._complete()
        except BaseException as error:  # noqa: BLE001 - SystemExit too would stop the worker
            await self._respond_to_error(error)
        finally:
            if not self.is_finished:
                self._finish()
            if self.middleware.limits.buffered:
                self.middleware.limits.buffered.pop(self, None)

    def send(self, message: Message) -> Awaitable[None]:
        """Pass a message of the response on, with the request ID: an ASGI `send`."""
        timeout_response = self.timeout_response
        if timeout_response is not None and asyncio.current_task() is not timeout_response:
            return asyncio.sleep(0)  # the client gets the 504
        if message["type"] == "http.response.start":
            return self._start_response(message)
        # The connection of a large response may be lost, and the application go on for a while.
        is_small = self.size_bytes <= LARGE_RESPONSE_BYTES
        if is_small or not self._is_cut():
            self.size_bytes += len(message.get("body", b""))
        if message.get("more_body", False):
            self.middleware.limits.start_stream(self)
            self._end_unheard_stream()
            return self._send(message)
        return self._send_last(message)

    def _start_response(self, message: Message) -> Awaitable[None]:
        """Pass the start of the response on; reject a stream over the limit in its place."""
        headers = message.get("headers", ())
        has_length = False
        for name, _ in headers:
            if name in _NOTED_FIELDS:
                if name == b"content-length":
                    has_length = True
                else:
                    headers = _without_server_fields(headers)
        if not has_length and self._is_stream(message):
            if self.middleware.limits.is_full_of_streams:
                return self._reject_stream()
            self.kind = "stream"
            self.middleware.limits.start_stream(self)
        request_id = (b"x-request-id", self.context["request_id"].encode())
        message["headers"] = [*headers, request_id]
        if self.middleware.cors is not None:
            add_missing_headers(self.middleware.cors, self.scope, message)
        self.status = self.status or message["status"]
        return self._send(message)

    def _end_unheard_stream(self) -> None:
        """Raise `ClientDisconnect` if the application still streams to a client that has left.

        uvicorn drops what is sent then. Starlette's responses are cancelled at once; an ASGI
        application that does not receive would stream forever.
        """
        if not self._is_disconnected(default=False):
            return
        now = time.perf_counter()
        if not self.left_at:
            self.left_at = now
        elif now - self.left_at > UNHEARD_SECONDS:
            raise ClientDisconnect

    def _is_cut(self) -> bool:
        """Whether the server can write no more; it may not have reported that yet."""
        cycle = getattr(self._send, "__self__", None)
        connection = getattr(cycle, "transport", None)
        return connection is not None and connection.is_closing()

    async def _send_last(self, message: Message) -> None:
        """Send the end of the response, which then counts as sent; the server may reject it."""
        await self._send(message)
        if not self.is_finished:
            self._finish()

    def time_out(self) -> None:
        """Respond 504 and cancel the handler.

        The response does not wait for a handler that ignores its cancellation.
        """
        self._replace_handler(504, "The request timed out.")

    def _is_stream(self, start: Message) -> bool:
        """Return whether a response with this start is a stream: its length is not known."""
        has_body = self.scope["method"] != "HEAD" and start["status"] not in {204, 304}
        names = {name.lower() for name, _ in start.get("headers", ())}
        return has_body and b"content-length" not in names

    def _reject_stream(self) -> Awaitable[None]:
        """Respond 503 in place of a stream; what is returned waits until the handler ends."""
        self._replace_handler(503, TOO_MANY_STREAMS, {"Retry-After": "1"})
        return asyncio.get_running_loop().create_future()

    def _replace_handler(
        self, status: int, detail: str, headers: Mapping[str, str] | None = None
    ) -> None:
        """Respond with a problem in place of the handler, and cancel it."""
        response = self._respond_in_place(status, detail, headers)
        self.timeout_response = asyncio.create_task(response)
        if self.task is not None:
            cancel_after_thread(self.task)

    def _admit(self, body_bytes: int | None) -> Receive:
        """Return the `receive` of an admitted request. Raises `ServiceError` at a limit."""
        middleware = self.middleware
        middleware.limits.admit(self, body_bytes or 0)
        if not middleware.metrics.is_flush_scheduled:
            middleware.metrics.schedule_flush()
        if body_bytes is None:
            return self.receive
        return middleware.limits.limit_receive(self, self.receive, body_bytes)

    async def _complete(self) -> None:
        """Raise `RuntimeError` if the application has returned without a complete response."""
        if self.timeout_response is not None:
            await self.timeout_response
        elif not self._is_disconnected(default=False):
            msg = "the application returned without a complete response"
            raise RuntimeError(msg)

    async def _respond_to_error(self, error: BaseException) -> None:
        """Respond in place of the application that raised this. A bug is logged, once."""
        if not self._is_running():  # Python closes the coroutine, which can await nothing
            raise error
        if self.timeout_response is not None:
            if not isinstance(error, asyncio.CancelledError):
                self._report_bug(error)
            await self.timeout_response
        elif not self._is_end_of_client(error):
            await self._respond_once_more(self._response_to(error))

    def _response_to(self, error: BaseException) -> Response:
        if isinstance(error, ServiceError):
            log_cause(error)
            return http_problem(error)
        if isinstance(error, asyncio.CancelledError) and self._is_shut_down():
            return problem(503, "The service is shutting down.", {"Retry-After": "1"})
        self._report_bug(error)
        return problem(500)

    def _report_bug(self, error: BaseException) -> None:
        self.bug = type(error).__qualname__
        self.middleware.metrics.unhandled.inc()
        logger.error("unhandled exception", exc_info=error)

    async def _respond_once_more(self, response: Response) -> None:
        """Respond, or with 500 if the server rejects the response, such as for its headers."""
        try:
            await self._respond(response)
        except Exception as second:  # noqa: BLE001 - whatever it is, the client gets a response
            self._report_bug(second)
            await self._respond(problem(500))

    async def _respond(self, response: Response) -> None:
        """Send a response, unless another has begun that cannot be withdrawn."""
        if self.is_finished:
            return
        if self.status and not self._withdraw_response():
            return
        self.size_bytes = 0
        await response(self.scope, self.receive, self.send)

    def _withdraw_response(self) -> bool:
        """Have the server discard the response, if it has written nothing of it yet.

        Otherwise it closes the connection, by which the client notices that the response is
        incomplete (RFC 9112, section 8). Servers other than ours withdraw nothing.
        """
        cycle = getattr(self._send, "__self__", None)
        connection = getattr(cycle, "transport", None)
        withdraw = getattr(connection, "withdraw_response", None)
        if withdraw is None or not withdraw(cycle):
            return False
        self.status = 0
        return True

    def _is_disconnected(self, *, default: bool) -> bool:
        """Return whether the client has disconnected; `default` if the server does not know."""
        cycle = getattr(self._send, "__self__", None)
        return bool(getattr(cycle, "disconnected", default))

    def _is_end_of_client(self, error: BaseException) -> bool:
        """Return whether the application only reports that its client has disconnected."""
        return isinstance(error, ClientDisconnect) and self._is_disconnected(default=True)

    def _is_shut_down(self) -> bool:
        """Return whether the server has cancelled this request, and not the application itself."""
        is_cancelled = self.task is not None and self.task.cancelling() > 0
        return is_cancelled and self.middleware.lifecycle.may_cancel_requests()

    def _is_running(self) -> bool:
        try:
            return asyncio.current_task() is self.task
        except RuntimeError:  # without an event loop
            return False

    async def _respond_in_place(
        self, status: int, detail: str, headers: Mapping[str, str] | None
    ) -> None:
        request_context.set(self.context)
        await self._respond(problem(status, detail, headers))

    def _finish(self) -> None:
        """Count and log the request: its response is sent, or the client disconnected."""
        seconds = time.perf_counter() - self.start
        self.is_finished = True
        middleware = self.middleware
        is_in_flight = middleware.limits.in_flight.pop(self, self) is None
        was_open = not is_in_flight and middleware.limits.end_stream(self)
        is_stream = was_open and self.kind == "stream"
        method = self.scope["method"]
        route = route_template(self.scope)
        status = self.status or CLIENT_CLOSED_REQUEST
        if CLIENT_LEFT in self.scope["state"]:  # the response went nowhere
            status = CLIENT_CLOSED_REQUEST
        labels = (method if method in _METHODS else "_OTHER", route, status)
        if is_stream:
            middleware.metrics.record_stream(self.kind, route, seconds)
        measured = self.opened_seconds if is_stream else seconds
        middleware.metrics.record(labels, measured)
        if self.span is not None:
            self._end_span(self.span, labels, measured)
        is_probe = route.startswith("/health/") and not is_mounted(self.scope)
        if is_probe and status < 400:
            return
        if self.size_bytes <= LARGE_RESPONSE_BYTES:
            self._log(method, route, status, seconds)
        else:
            self._when_delivered(partial(self._log, method, route, status, seconds))

    def _end_span(self, span: RequestSpan, labels: tuple[str, str, int], seconds: float) -> None:
        if span.is_recording():
            self.middleware.metrics.record_trace(labels, seconds, self.context)
            span.finish(self.scope, labels, redact(self.scope["path"]), self.bug)

    def _when_delivered(self, log: Callable[..., None]) -> None:
        """Log once the client has the response, or once its connection is lost.

        Servers other than ours do not report either.
        """
        cycle = getattr(self._send, "__self__", None)
        connection = getattr(cycle, "transport", None)
        when_delivered = getattr(connection, "when_delivered", None)
        if when_delivered is None:
            log()
        else:
            when_delivered(log)

    def _log(
        self, method: str, route: str, status: int, seconds: float, undelivered_bytes: int = 0
    ) -> None:
        client = self.scope["client"]
        # Redacted before it is truncated, or half a password would be left.
        path = redact(self.scope["path"])
        if len(path) > SHORT_PATH:
            path = truncate(path, MAX_PATH_BYTES)
        self.middleware.access_log.write(
            {
                "method": method,
                "path": path,
                "route": route,
                "status": status,
                "duration_ms": round(seconds * 1000, 3),
                "response_bytes": max(self.size_bytes - undelivered_bytes, 0),
                "client": client[0] if client else None,
                **self.context,
            }
        )


class Handshake(Exchange):
    """The handshake of a WebSocket: an exchange with status 101, or a rejected request.

    Once accepted, a WebSocket is a stream. Its access line is written when it ends. A bug of its
    handler closes it.
    """

    kind = "websocket"

    def __init__(
        self, middleware: RequestMiddleware, scope: Scope, receive: Receive, send: Send
    ) -> None:
        super().__init__(middleware, scope, receive, send)
        scope["method"] = "GET"  # the only one (RFC 6455, section 4.1)
        self.is_closed = False

    async def serve(self) -> None:
        """Run the application until the WebSocket is closed; close it after its handler."""
        try:
            await super().serve()
            if self.status == SWITCHING_PROTOCOLS:
                await self._close(NORMAL_CLOSURE)
        finally:
            self._end()

    def send(self, message: Message) -> Awaitable[None]:
        """Pass a message on, with the request ID; reject with a problem document."""
        timeout_response = self.timeout_response
        if timeout_response is not None and asyncio.current_task() is not timeout_response:
            return asyncio.sleep(0)  # the client gets the 504
        kind = message["type"]
        if self.is_finished:
            return self._send_open(message)
        if kind == "websocket.close":
            return self._respond(problem(403))
        if kind == "websocket.accept":
            return self._accept(message)
        if kind == "websocket.http.response.start":
            self._start(message, message["status"])
        self.size_bytes += len(message.get("body", b""))
        is_last = kind == "websocket.http.response.body" and not message.get("more_body", False)
        return self._send_last(message) if is_last else self._send(message)

    def _accept(self, message: Message) -> Awaitable[None]:
        """Accept the handshake, or reject a WebSocket over the limit."""
        limits = self.middleware.limits
        if limits.is_full_of_streams:
            return self._reject_stream()
        limits.start_stream(self)
        self._start(message, SWITCHING_PROTOCOLS)
        return self._send_last(message)

    def _start(self, message: Message, status: int) -> None:
        self.status = status
        headers = _without_server_fields(message.get("headers", ()))
        request_id = (b"x-request-id", self.context["request_id"].encode())
        message["headers"] = [*headers, request_id]

    def _send_open(self, message: Message) -> Awaitable[None]:
        """Send a message of an open WebSocket, and count its bytes."""
        self.is_closed = self.is_closed or message["type"] == "websocket.close"
        text = message.get("text")
        if text is None:
            self.size_bytes += len(message.get("bytes") or b"")
        else:
            self.size_bytes += len(text) if text.isascii() else len(text.encode())
        return self._send(message)

    def _admit(self, body_bytes: int | None) -> Receive:
        """Admit a handshake. Raises `ServiceError` at a limit, that of streams included."""
        receive = super()._admit(body_bytes)
        if self.middleware.limits.is_full_of_streams:
            raise UnavailableError(TOO_MANY_STREAMS)
        return receive

    async def _respond(self, response: Response) -> None:
        """Reject the handshake with a response, or close an open connection."""
        if not self.is_finished:
            await super()._respond(response)
        elif self.status == SWITCHING_PROTOCOLS:
            await self._close(INTERNAL_ERROR)

    async def _close(self, code: int) -> None:
        """Close the WebSocket, unless it is closed."""
        if not self.is_closed:
            with contextlib.suppress(ClientDisconnected):
                await self._send_open({"type": "websocket.close", "code": code})

    def _finish(self) -> None:
        """Count the handshake; log a rejected one. An accepted one goes on as a stream."""
        if self.status != SWITCHING_PROTOCOLS:
            super()._finish()
            return
        self.is_finished = True
        labels = ("GET", route_template(self.scope), SWITCHING_PROTOCOLS)
        self.middleware.metrics.record(labels, self.opened_seconds)
        if self.span is not None:
            self._end_span(self.span, labels, self.opened_seconds)

    def _end(self) -> None:
        """Count and log a WebSocket that has ended."""
        if not self.middleware.limits.end_stream(self):
            return
        seconds = time.perf_counter() - self.start
        route = route_template(self.scope)
        self.middleware.metrics.record_stream(self.kind, route, seconds)
        connection = getattr(self._send, "__self__", None)
        fields: Any = {
            "request_bytes": getattr(connection, "received_bytes", 0),
            "close_code": getattr(connection, "close_code", ABNORMAL_CLOSURE),
        }
        self.context = self.context | fields
        self._log("GET", route, SWITCHING_PROTOCOLS, seconds)

    def _is_end_of_client(self, error: BaseException) -> bool:
        """Return whether the error reports that the client has disconnected.

        Then the server cancels a handler that does not notice it.
        """
        is_cancelled = isinstance(error, asyncio.CancelledError)
        if is_cancelled and self._is_disconnected(default=False):
            return True
        return isinstance(error, _DISCONNECTS)


def _without_server_fields(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers without the application's own: the request ID must be that of the log."""
    return [each for each in headers if each[0] not in _SERVER_FIELDS]
