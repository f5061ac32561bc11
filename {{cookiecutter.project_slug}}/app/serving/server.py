"""Uvicorn's server, with a shutdown that loses no request.

Lifespan shutdown always runs.
"""

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable
from types import FrameType
from typing import Any

from gunicorn.arbiter import Arbiter
from uvicorn.server import Server
from uvicorn_worker import UvicornWorker

from app import lifecycle
from app.serving import shared_flags
from app.serving.http_protocol import HttpRequestProtocol
from app.serving.listener import stop_accepting
from app.serving.state import ServiceState
from app.serving.websocket_protocol import ServiceWebSocket
from app.settings import Settings

#: How long a worker that retires alone keeps listening: its replacement needs that to start.
REPLACEMENT_SECONDS = 1.0
#: The part of the graceful timeout that is kept for lifespan shutdown: a second each for the last
#: check, for cancelled tasks and for connection pools.
CLOSING_SECONDS = 3.0
#: Time limit for requests in a quick shutdown.
QUICK_SECONDS = 1.0
#: How often a retiring worker checks whether its connections are closed.
POLL_SECONDS = 0.05
#: How often the heartbeat is kept, and a quick shutdown noticed, during shutdown.
WATCH_SECONDS = 0.2
#: The event loop closes listeners and aborted connections in its next iteration.
NEXT_ITERATION_SECONDS = 0.01
#: Pause between two ticks. uvicorn's tenth of a second is most of what an idle worker costs.
TICK_SECONDS = 1.0

logger = logging.getLogger("app.server")


class ServiceServer(Server):
    """Drains with the pod, or retires alone; resets no connection in either case."""

    server_state: ServiceState

    def __init__(self, worker: UvicornWorker) -> None:
        super().__init__(worker.config)
        self.worker = worker
        self.settings: Settings = worker.settings
        self.lifecycle = lifecycle.PROCESS
        self.server_state = ServiceState(self.settings)
        #: By `time.monotonic()`, as all times here.
        self.shutdown_requested_at = math.inf
        self.quick_shutdown_requested_at = math.inf
        self.replacement_requested = False
        self.loop: Any = asyncio.get_running_loop()
        #: Ends the pause before the next tick.
        self.is_signaled = asyncio.Event()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until signaled to stop.

        uvicorn would raise the signal again, and functions registered with `atexit` would not run.
        """
        with self.capture_signals():
            await self._serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start. Exits if the lifespan has not reached the service, in which nothing would work."""
        await super().startup(sockets)
        if not self.lifespan.state:
            await self.lifespan.shutdown()
            logger.error("lifespan did not run: what wraps the service must pass `lifespan` on")
            sys.exit(Arbiter.WORKER_BOOT_ERROR)

    def handle_exit(self, sig: int, frame: FrameType | None = None) -> None:
        """Handle a signal: request a shutdown, and notice it at once."""
        self._request_shutdown(sig)
        # Python calls this between any two instructions.
        self.loop.call_soon_threadsafe(self.is_signaled.set)

    def _request_shutdown(self, sig: int) -> None:
        """Request a shutdown; with SIGINT or SIGQUIT a quick one, as in gunicorn.

        Only the first request counts: a signal to the process group arrives twice.
        """
        now = time.monotonic()
        self.shutdown_requested_at = min(self.shutdown_requested_at, now)
        if sig != signal.SIGTERM:
            self.quick_shutdown_requested_at = min(self.quick_shutdown_requested_at, now)

    async def main_loop(self) -> None:
        """Tick until it is time to stop: once a second, and at each signal."""
        # 0 is a full second in uvicorn's count.
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause_seconds()):
                    await self.is_signaled.wait()
            self.is_signaled.clear()

    def _pause_seconds(self) -> float:
        return min(self._stop_at() - time.monotonic(), TICK_SECONDS)

    async def on_tick(self, counter: int) -> bool:
        """Enforce timeouts, request a replacement when due; return whether to stop."""
        self._notice_shutdown()
        self._request_replacement_when_due()
        for connection in list(self.server_state.connections):
            if isinstance(connection, HttpRequestProtocol | ServiceWebSocket):
                connection.enforce_timeouts()
        self.should_exit = time.monotonic() >= self._stop_at()
        return await super().on_tick(counter)

    def _notice_shutdown(self) -> None:
        """Request a shutdown if the pod shuts down or the master is dead.

        A worker without its master would keep the port from the next start.
        """
        is_orphan = os.getppid() != self.worker.ppid
        if shared_flags.is_draining() or is_orphan:
            is_quick = shared_flags.is_quick_shutdown()
            self._request_shutdown(signal.SIGQUIT if is_quick else signal.SIGTERM)

    def _request_replacement_when_due(self) -> None:
        """Request a replacement once `MAX_REQUESTS` requests are served."""
        requests = self.server_state.total_requests
        if requests >= self.worker.max_requests and not self.replacement_requested:
            self.replacement_requested = True
            logger.info("replacement requested", extra={"requests": requests})
            shared_flags.request_replacement(self.worker.age)

    def _stop_at(self) -> float:
        """Return when to stop: after the drain, or at once in a quick shutdown."""
        is_draining = shared_flags.is_draining()
        wait = self.settings.drain_seconds if is_draining else REPLACEMENT_SECONDS
        return min(self.shutdown_requested_at + wait, self.quick_shutdown_requested_at)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Retire, then shut down as uvicorn does, all of it within the graceful timeout."""
        watch = asyncio.create_task(self._watch_shutdown())
        try:
            await self._retire_or_log(sockets or [])
            seconds_left = self._deadline() - time.monotonic()
            # Annotated as an integer; fractions work too.
            self.config.timeout_graceful_shutdown = max(seconds_left, 0)  # type: ignore[assignment]
            await super().shutdown()
        finally:
            watch.cancel()

    async def _retire_or_log(self, sockets: list[socket.socket]) -> None:
        """Retire; log an error, since lifespan shutdown has to run all the same."""
        try:
            await self._retire(sockets)
        except Exception:
            logger.exception("retirement failed")

    async def _retire(self, sockets: list[socket.socket]) -> None:
        """Stop listening, and give every connection a response with `Connection: close`.

        Connections without a request within `RETIRE_SECONDS` are left to uvicorn, which closes
        them. Responses that have begun, such as streams, are aborted then, and handlers of closed
        WebSockets are cancelled.
        """
        self.server_state.is_retiring = True
        await self._stop_listening(sockets)
        for connection in self._http_connections():
            connection.close_after_response()
        self.lifecycle.retire()  # streams end, and close their connections
        websockets = self.server_state.connections - set(self._http_connections())
        for websocket in websockets:
            websocket.shutdown()  # closes with 1012: service restart
        await self._wait_for_connections(self.settings.retire_seconds)
        for connection in self._http_connections():
            connection.abort_unfinished()
        for websocket in websockets & self.server_state.connections:  # its client does not read
            websocket.transport.abort()
        await asyncio.sleep(NEXT_ITERATION_SECONDS)
        for cancel_handler in list(self.server_state.cancel_left_handlers):
            cancel_handler()

    async def _wait_for_connections(self, seconds: float) -> None:
        """Wait until all connections are closed, at most `seconds`.

        A quick shutdown ends the wait.
        """
        end = time.monotonic() + seconds
        await asyncio.sleep(POLL_SECONDS)
        while self.server_state.connections:
            if time.monotonic() >= min(end, self.quick_shutdown_requested_at):
                return
            await asyncio.sleep(POLL_SECONDS)

    async def _stop_listening(self, sockets: list[socket.socket]) -> None:
        """Stop listening, and serve the connections that the kernel has already accepted.

        Closing the sockets would reset these connections.
        """
        copies = [listener.dup() for listener in sockets]
        # A worker that retires alone shares its sockets with others, which go on accepting. So does
        # a service with the next one, if systemd owns the sockets.
        if shared_flags.is_draining() and not self.worker.has_inherited_sockets:
            for listener in copies:
                stop_accepting(listener)
        for server in self.servers:
            server.close()
        await asyncio.sleep(NEXT_ITERATION_SECONDS)
        for connection in _accept_queued(copies):
            connection.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.connect_accepted_socket(self._create_protocol, connection)

    def descriptors(self) -> list[int]:
        """Return the descriptors of the event loop, of its listeners and of its connections.

        A forked child that kept them would take the loop's events, and hold the port and the
        connections open.
        """
        connections = self.server_state.connections
        sockets = [each.transport.get_extra_info("socket") for each in connections]
        for server in self.servers:
            sockets.extend(server.sockets)
        descriptors = [self.loop._get_backend_id()]  # uvloop's epoll
        descriptors += [each.fileno() for each in sockets]
        return [each for each in descriptors if each >= 0]

    def _create_protocol(self) -> HttpRequestProtocol:
        return HttpRequestProtocol(self.config, self.server_state, self.lifespan.state)

    def _http_connections(self) -> list[HttpRequestProtocol]:
        connections = self.server_state.connections
        return [each for each in connections if isinstance(each, HttpRequestProtocol)]

    def _deadline(self) -> float:
        """Return when requests and background tasks are cancelled."""
        seconds = self.settings.graceful_timeout_seconds - CLOSING_SECONDS
        graceful_deadline = self.shutdown_requested_at + seconds
        return min(graceful_deadline, self._quick_deadline())

    def _quick_deadline(self) -> float:
        return self.quick_shutdown_requested_at + QUICK_SECONDS

    async def _watch_shutdown(self) -> None:
        """Keep the heartbeat during shutdown, and turn it into a quick one on request."""
        while True:
            self.worker.notify()
            if shared_flags.is_quick_shutdown():
                self._request_shutdown(signal.SIGQUIT)
            self.lifecycle.closing_deadline = self._deadline()
            if time.monotonic() > self._quick_deadline():
                self._abort_everything()
            await asyncio.sleep(WATCH_SECONDS)

    def _abort_everything(self) -> None:
        for task in self.server_state.tasks:
            task.cancel()
        for connection in self.server_state.connections:
            connection.transport.abort()


def _accept_queued(listeners: Iterable[socket.socket]) -> list[socket.socket]:
    """Return the connections in the queues of these listeners, and close the listeners."""
    connections = []
    for listener in listeners:
        with contextlib.suppress(OSError), listener:
            while True:
                connections.append(listener.accept()[0])
    return connections
