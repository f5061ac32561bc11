"""Uvicorn's server, with an end in which no request is lost and lifespan shutdown always runs."""

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import time
from types import FrameType

from uvicorn.server import Server
from uvicorn_worker import UvicornWorker

from app.serving import shared_flags
from app.serving.http_protocol import HttpRequestProtocol
from app.serving.listener import stop_accepting
from app.settings import Settings

#: For which a worker that leaves alone goes on: so long does its successor take to start.
SUCCESSOR_SECONDS = 1.0
#: What is kept of the graceful timeout for lifespan shutdown: one for the last check, for what is cancelled, for pools.
CLOSING_SECONDS = 3.0
#: For requests, where the end is to be quick.
QUICK_SECONDS = 1.0

logger = logging.getLogger("app.server")


class ServiceServer(Server):
    """Uvicorn's server, which drains with the pod, and retires alone without resetting anything."""

    def __init__(self, worker: UvicornWorker) -> None:
        super().__init__(worker.config)
        self.worker = worker
        self.settings: Settings = worker.wsgi.state.settings
        self.shutdown_requested_at = self.quick_shutdown_requested_at = (
            math.inf
        )  # when it learnt of its end
        self.replacement_requested = False
        self.server_state.is_retiring = False  # type: ignore[attr-defined]

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop. Uvicorn would raise the signal again, and `atexit` would never run."""
        with self.capture_signals():
            await self._serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None = None) -> None:
        """Learn of the end; a process group's signal comes twice. SIGINT and SIGQUIT mean a quick one to gunicorn."""
        now = time.monotonic()
        self.shutdown_requested_at = min(self.shutdown_requested_at, now)
        if sig != signal.SIGTERM:
            self.quick_shutdown_requested_at = min(self.quick_shutdown_requested_at, now)

    async def on_tick(self, counter: int) -> bool:
        """Decide ten times a second whether to stop. Without its master a worker would block the next start."""
        if shared_flags.is_draining() or os.getppid() != self.worker.ppid:
            self.handle_exit(signal.SIGQUIT if shared_flags.is_quick_shutdown() else signal.SIGTERM)
        if (
            self.server_state.total_requests >= self.worker.max_requests
            and not self.replacement_requested
        ):
            self.replacement_requested = True
            logger.info(
                "%d requests served, asking for a successor", self.server_state.total_requests
            )
            shared_flags.request_replacement(self.worker.age)
        if counter % 10 == 0:
            for connection in self._http():
                connection.enforce_timeouts()
        wait = self.settings.drain_seconds if shared_flags.is_draining() else SUCCESSOR_SECONDS
        self.should_exit = time.monotonic() >= min(
            self.shutdown_requested_at + wait, self.quick_shutdown_requested_at
        )
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Retire, then close as uvicorn does, all of it within the graceful timeout."""
        watch = asyncio.create_task(self._watch())
        try:
            try:
                await self._retire(sockets or [])
            except Exception:  # lifespan shutdown must run all the same
                logger.exception("retirement failed")
            left = self._deadline() - time.monotonic()
            self.config.timeout_graceful_shutdown = max(left, 0)  # type: ignore[assignment]  # it takes fractions
            await super().shutdown()
        finally:
            watch.cancel()

    async def _retire(self, sockets: list[socket.socket]) -> None:
        """Stop listening, then let every connection have its answer with `Connection: close`, if it asks in time."""
        self.server_state.is_retiring = True  # type: ignore[attr-defined]
        await self._stop_listening(sockets)
        for connection in self._http():
            connection.close_after_response()
        websockets = self.server_state.connections - set(self._http())
        for websocket in websockets:
            websocket.shutdown()  # closes with 1012: service restart
        end = time.monotonic() + self.settings.retire_seconds
        await asyncio.sleep(0.05)
        while self.server_state.connections and time.monotonic() < min(
            end, self.quick_shutdown_requested_at
        ):
            await asyncio.sleep(0.05)
        for connection in self._http():
            connection.abort_unfinished()
        for websocket in websockets & self.server_state.connections:  # its client does not read
            websocket.transport.abort()
        await asyncio.sleep(0.01)  # they are gone in the next turn of the loop

    async def _stop_listening(self, sockets: list[socket.socket]) -> None:
        """Take what the kernel has already accepted, and serve it: closing would reset it."""
        loop = asyncio.get_running_loop()
        copies = [listener.dup() for listener in sockets]
        if shared_flags.is_draining():  # else the other workers go on with the same sockets
            for listener in copies:
                stop_accepting(listener)
        for server in self.servers:
            server.close()
        await asyncio.sleep(0.01)  # uvloop stops listening in its next turn
        accepted = []
        for listener in copies:
            with contextlib.suppress(OSError), listener:
                while True:
                    accepted.append(listener.accept()[0])
        for connection in accepted:
            connection.setblocking(False)
            await loop.connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> HttpRequestProtocol:
        return HttpRequestProtocol(self.config, self.server_state, self.lifespan.state)

    def _http(self) -> list[HttpRequestProtocol]:
        return [
            each for each in self.server_state.connections if isinstance(each, HttpRequestProtocol)
        ]

    def _deadline(self) -> float:
        """Return when requests, and work in the background, have had their time."""
        graceful = (
            self.shutdown_requested_at + self.settings.graceful_timeout_seconds - CLOSING_SECONDS
        )
        return min(graceful, self.quick_shutdown_requested_at + QUICK_SECONDS)

    async def _watch(self) -> None:
        """Keep the heartbeat while closing; cut off what is left if the end has to be quick after all."""
        while True:
            self.worker.notify()
            if shared_flags.is_quick_shutdown():
                self.handle_exit(signal.SIGQUIT)
            self.worker.wsgi.state.lifecycle.closing_deadline = (
                self._deadline()
            )  # lifespan.py reads it
            if time.monotonic() > self.quick_shutdown_requested_at + QUICK_SECONDS:
                for task in self.server_state.tasks:
                    task.cancel()
                for connection in self.server_state.connections:
                    connection.transport.abort()
            await asyncio.sleep(0.2)
