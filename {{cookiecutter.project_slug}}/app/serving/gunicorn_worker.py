"""The gunicorn worker that `worker_class` in gunicorn.conf.py names: uvicorn's, with our server and protocol."""

import asyncio
import faulthandler
import logging
import signal
import sys
import tempfile
from typing import Any, ClassVar

from gunicorn.arbiter import Arbiter
from uvicorn_worker import UvicornWorker

from app.serving import shared_flags
from app.serving.http_protocol import HttpRequestProtocol
from app.serving.server import ServiceServer
from app.serving.websocket_protocol import ServiceWebSocket


class ServiceWorker(UvicornWorker):  # type: ignore[misc]
    """Serves the app in a process that gunicorn's master has forked."""

    CONFIG_KWARGS: ClassVar[dict[str, Any]] = {
        "loop": "uvloop",
        "http": HttpRequestProtocol,
        "ws": ServiceWebSocket,
        "lifespan": "on",  # with "auto", an error while starting would leave a service that answers 500 to everything
        "server_header": False,
        "access_log": False,  # observe.py writes it
        "proxy_headers": False,  # and reads these
        "timeout_notify": 1,  # by default timeout/2, which kills loops that are blocked for only that long
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Prepare, still in the master, what it and the worker share."""
        super().__init__(*args, **kwargs)
        self.config.limit_max_requests = None  # ours asks for a successor first
        self.is_retiring = False
        self.crash_file = tempfile.TemporaryFile(dir=self.cfg.worker_tmp_dir)  # noqa: SIM115 - closed by log_crash_stacks()
        shared_flags.reset_flag(self.age)

    def init_signals(self) -> None:
        """Have the stacks written where the master finds them, of a loop that is stuck (SIGABRT) and of a crash."""
        super().init_signals()
        faulthandler.enable(self.crash_file, all_threads=True)

    def log_crash_stacks(self) -> None:
        """Log, in the master, the stacks that this worker left, if it was stuck or has crashed."""
        with self.crash_file:
            self.crash_file.seek(0)
            if stacks := self.crash_file.read().decode(errors="replace"):
                text = "worker %s was stuck, or has crashed; what it was doing is in `stacks`"
                logging.getLogger("app.worker").critical(text, self.pid, extra={"stacks": stacks})

    async def _serve(self) -> None:
        settings = self.wsgi.state.settings
        self.wsgi.state.lifecycle.is_draining = shared_flags.is_draining
        self.config.app, self.config.root_path = self.wsgi, settings.root_path
        self.config.ws_max_size = settings.max_body_bytes
        server = ServiceServer(self)
        asyncio.get_running_loop().add_signal_handler(
            signal.SIGQUIT, server.handle_exit, signal.SIGQUIT
        )
        # Copies: uvloop closes the file of what it serves, and gunicorn's objects would log an error for it.
        sockets = [own.dup() for own in self.sockets]
        for own in self.sockets:
            own.close()
        await server.serve(sockets)
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)
