"""The server of `make dev`: uvicorn on a socket that already listens.

Usage: `python -m scripts.dev_server DESCRIPTOR`. Each start reads the settings again.
"""

import contextlib
import socket
import sys

import uvicorn

from app.settings import load_settings
from app.telemetry import logs


def serve(listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM."""
    settings = load_settings()
    config = uvicorn.Config(
        "app.main:app",
        loop="app.network.event_loop:EventLoop",
        log_config=logs.config(settings),
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        root_path=settings.root_path,
        timeout_graceful_shutdown=1,
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
