"""The gunicorn worker: uvicorn's, but it ends by itself when told to, and always runs lifespan shutdown."""

import asyncio
import mmap
import os
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, ClassVar

from gunicorn.arbiter import Arbiter
from uvicorn.config import Config
from uvicorn.server import Server
from uvicorn_worker import UvicornWorker

#: One byte that the master sets for all workers, mapped before they are forked. A signal alone could be lost: in a
#: worker that was forked just now, gunicorn's own handlers still swallow it.
_ENDING = mmap.mmap(-1, mmap.PAGESIZE)
_GRACEFULLY, _QUICKLY = 1, 2
#: Seconds of the graceful timeout that are kept for lifespan shutdown.
CLOSING_SECONDS = 5


def is_draining() -> bool:
    """Tell whether the whole pod is ending, and not just this worker."""
    return _ENDING[0] != 0


def hook(arbiter: Any) -> None:
    """Change what gunicorn's master does with signals (`when_ready` of gunicorn.conf.py).

    It says that it ends before it signals its workers. SIGHUP replaces the workers and reads nothing anew: the app is
    preloaded with its settings, and a wrong one must not end a master that serves.
    """
    stop: Callable[[bool], None] = arbiter.stop

    def announced(graceful: bool = True) -> None:
        _ENDING[0] = max(_ENDING[0], _GRACEFULLY if graceful else _QUICKLY)
        stop(graceful)

    arbiter.stop = announced
    arbiter.app.reload = lambda: None


class ServiceServer(Server):
    """Uvicorn's server, which keeps SIGTERM to itself."""

    def __init__(self, config: Config, master: int) -> None:
        """Take the pid of gunicorn's master."""
        super().__init__(config)
        self.master = master

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop. Uvicorn would raise the signal again, and `atexit` would never run."""
        with self.capture_signals():
            await self._serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End: with SIGTERM gracefully, with SIGINT and SIGQUIT after one second for requests, as gunicorn means it."""
        if sig != signal.SIGTERM:
            self.config.timeout_graceful_shutdown = 1
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Look ten times a second whether the pod is ending; without its master a worker would block the next start."""
        if is_draining() or os.getppid() != self.master:
            self.handle_exit(signal.SIGQUIT if _ENDING[0] == _QUICKLY else signal.SIGTERM, None)
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
        self.config.timeout_notify = 1  # by default timeout/2, which kills loops that are blocked for only that long
        self.config.timeout_graceful_shutdown = max(1, self.cfg.graceful_timeout - CLOSING_SECONDS)

    async def _serve(self) -> None:
        self.config.app = self.wsgi
        self.config.root_path = self.wsgi.state.settings.root_path
        server = ServiceServer(self.config, self.ppid)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGQUIT, server.handle_exit, signal.SIGQUIT, None)
        # Copies: uvloop closes the file of what it serves, and gunicorn's objects would log an error for it.
        sockets = [socket.socket(fileno=socket.dup(own.fileno())) for own in self.sockets]
        for own in self.sockets:
            own.close()
        await server.serve(sockets)
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)
