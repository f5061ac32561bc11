"""The gunicorn worker: uvicorn's, but it ends by itself when told to, and always runs lifespan shutdown."""

import asyncio
import mmap
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, ClassVar

from gunicorn.arbiter import Arbiter
from uvicorn.server import Server
from uvicorn_worker import UvicornWorker

from app.settings import load_settings

#: One byte that the master sets for all workers, mapped before they are forked. A signal alone could be lost: in a
#: worker that was forked just now, gunicorn's own handlers still swallow it.
_ENDING = mmap.mmap(-1, mmap.PAGESIZE)
_GRACEFULLY, _QUICKLY = 1, 2
#: Seconds of the graceful timeout that are kept for lifespan shutdown.
CLOSING_SECONDS = 5


def is_draining() -> bool:
    """Tell whether the whole pod is ending, and not just this worker."""
    return _ENDING[0] != 0


def announce_end(arbiter: Any) -> None:
    """Make gunicorn's master say that it ends before it signals its workers (`when_ready` of gunicorn.conf.py)."""
    stop: Callable[[bool], None] = arbiter.stop

    def announced(graceful: bool = True) -> None:
        _ENDING[0] = max(_ENDING[0], _GRACEFULLY if graceful else _QUICKLY)
        stop(graceful)

    arbiter.stop = announced


class ServiceServer(Server):
    """Uvicorn's server, which keeps SIGTERM to itself."""

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop. Uvicorn would raise the signal again, and `atexit` would never run."""
        with self.capture_signals():
            await self._serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End: with SIGTERM gracefully, with SIGINT and SIGQUIT after one second for requests, as gunicorn means it."""
        if sig != signal.SIGTERM:
            self.config.timeout_graceful_shutdown = 1
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close as uvicorn does, but leave gunicorn's sockets alone: uvloop has closed them by then."""
        await super().shutdown(sockets=[])

    async def on_tick(self, counter: int) -> bool:
        """Look ten times a second whether the pod is ending."""
        if is_draining():
            self.handle_exit(signal.SIGTERM if _ENDING[0] == _GRACEFULLY else signal.SIGQUIT, None)
        return await super().on_tick(counter)


class ServiceWorker(UvicornWorker):  # type: ignore[misc]
    """What `worker_class` in gunicorn.conf.py names."""

    CONFIG_KWARGS: ClassVar[dict[str, Any]] = {
        "loop": "uvloop",
        "http": "httptools",
        "lifespan": "on",  # with "auto", an error while starting would leave a service that answers 500 to everything
        "server_header": False,
        "access_log": False,  # observe.py writes it
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config.root_path = load_settings().root_path
        self.config.timeout_notify = 1  # by default timeout/2, which kills loops that are blocked for only that long
        self.config.timeout_graceful_shutdown = max(1, self.cfg.graceful_timeout - CLOSING_SECONDS)

    async def _serve(self) -> None:
        self.config.app = self.wsgi
        server = ServiceServer(self.config)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGQUIT, server.handle_exit, signal.SIGQUIT, None)
        await server.serve(sockets=self.sockets)
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)
