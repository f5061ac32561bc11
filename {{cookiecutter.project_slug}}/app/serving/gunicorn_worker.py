"""The gunicorn worker: uvicorn's, with the server and the protocols of this package.

`worker_class` in gunicorn.conf.py refers to it.
"""

import asyncio
import faulthandler
import logging
import math
import signal
import socket
import sys
import tempfile
from typing import Any, ClassVar

from gunicorn.arbiter import Arbiter
from uvicorn_worker import UvicornWorker

from app import lifecycle
from app.lifecycle import isolate_children
from app.serving import shared_flags
from app.serving.http_protocol import HttpRequestProtocol
from app.serving.server import ServiceServer
from app.serving.websocket_protocol import ServiceWebSocket
from app.settings import Settings, load_settings

logger = logging.getLogger("app.worker")


class ServiceWorker(UvicornWorker):  # type: ignore[misc]
    """Serves the application in a process that gunicorn's master has forked."""

    CONFIG_KWARGS: ClassVar[dict[str, Any]] = {
        # uvicorn would guess, wrongly for a callable that is no coroutine function.
        "interface": "asgi3",
        "loop": "app.network.event_loop:EventLoop",
        "http": HttpRequestProtocol,
        "ws": ServiceWebSocket,
        # With "auto", a service whose startup fails would respond 500 to every request.
        "lifespan": "on",
        "server_header": False,
        # app/web/middleware.py writes the access log and handles proxy headers.
        "access_log": False,
        "proxy_headers": False,
        # With each tick. By default after timeout / 2, which kills a worker whose loop is blocked
        # for only that long.
        "timeout_notify": 0,
    }

    #: Whether another process, such as systemd, owns the listening sockets. The arbiter sets it.
    has_inherited_sockets = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Create, while still in the master, everything that master and worker share."""
        super().__init__(*args, **kwargs)
        # `ServiceServer` counts requests itself, to request a replacement before it retires.
        self.config.limit_max_requests = None
        self.is_retiring = False
        # `log_crash_stacks` closes it.
        self.crash_file = tempfile.TemporaryFile(dir=self.cfg.worker_tmp_dir)  # noqa: SIM115
        shared_flags.reset_flag(self.age)

    def init_signals(self) -> None:
        """Have `faulthandler` write the stacks of a crash to a file that the master can read.

        A worker that times out receives SIGABRT, which counts as a crash.
        """
        super().init_signals()
        faulthandler.enable(self.crash_file, all_threads=True)

    def log_crash_stacks(self) -> None:
        """Log, in the master, the stacks of this worker if it has timed out or crashed."""
        with self.crash_file:
            self.crash_file.seek(0)
            stacks = self.crash_file.read().decode(errors="replace")
        if stacks:
            text = "worker %s timed out or crashed; see `stacks`"
            logger.critical(text, self.pid, extra={"stacks": stacks})

    def exit_reason(self) -> str:
        """Return, in the master, why this worker has exited: one of `EXIT_REASONS`."""
        if self.aborted:  # by gunicorn, after `WORKER_TIMEOUT_SECONDS` without a heartbeat
            return "timeout"
        if not shared_flags.is_finished(self.age):
            return "crashed"
        return "recycled" if self.is_retiring else "stopped"

    def run(self) -> None:
        """Serve until shutdown.

        `sys.exit` in a task, such as that of a streaming response, ends this task alone. asyncio
        would end the loop, and every other request with it.
        """
        with asyncio.Runner(loop_factory=self.config.get_loop_factory()) as runner:
            serving = runner.get_loop().create_task(self._serve())
            while not serving.done():
                try:
                    runner.get_loop().run_until_complete(serving)
                except (SystemExit, KeyboardInterrupt):
                    if serving.done():
                        raise

    async def _serve(self) -> None:
        self._configure()
        server = ServiceServer(self)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGQUIT, server.handle_exit, signal.SIGQUIT)
        isolate_children(server.descriptors)
        await server.serve(self._take_sockets())
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)
        shared_flags.mark_finished(self.age)

    def _configure(self) -> None:
        """Connect uvicorn's configuration and the application, which is loaded by now."""
        self.settings = _settings_of(self.wsgi)
        lifecycle.PROCESS.is_draining = shared_flags.is_draining
        lifecycle.PROCESS.closing_deadline = math.inf
        # Without the frame of `Service.__call__`, which does nothing else.
        self.config.app = getattr(self.wsgi, "request_middleware", self.wsgi)
        self.config.root_path = self.settings.root_path
        self.config.ws_max_size = self.settings.max_body_bytes

    def _take_sockets(self) -> list[socket.socket]:
        """Return copies of gunicorn's listening sockets, and close the originals.

        uvloop closes the file descriptors that it serves, at which gunicorn's objects would log an
        error.
        """
        copies = [original.dup() for original in self.sockets]
        for original in self.sockets:
            original.close()
        return copies


def _settings_of(app: Any) -> Settings:
    """Return the settings of the application, or those of the environment if it is wrapped."""
    settings = getattr(getattr(app, "state", None), "settings", None)
    return settings if isinstance(settings, Settings) else load_settings()
