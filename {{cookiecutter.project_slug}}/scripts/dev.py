"""Run the service for development: uvicorn with auto-reload in place of gunicorn, the metrics process beside it."""

import contextlib
import os
import tempfile
from pathlib import Path

import uvicorn

from app.settings import load_settings
from app.telemetry import logs
from scripts.fake_gateway import consumer  # example


def main() -> None:
    """Serve until Ctrl-C; a change below `app/` restarts the server."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="metrics-"))
        settings = {"ENVIRONMENT": "development", "WEB_CONCURRENCY": "1", "DRAIN_SECONDS": "0"}
        os.environ.update(settings | {"PROMETHEUS_MULTIPROC_DIR": folder})
        stack.enter_context(consumer())  # example
        serve(Path(folder))


def serve(folder: Path) -> None:
    """Run uvicorn with reload, and the metrics process on this folder."""
    from app.telemetry import (
        metrics_server,  # prometheus_client looks for the folder when it is imported
    )

    settings = load_settings()
    metrics = metrics_server.MetricsProcess(settings.metrics_bind, folder)
    metrics.ensure()
    host, _, port = settings.bind.rpartition(":")
    try:
        uvicorn.run(
            "app.main:app",
            host=host.strip("[]"),
            port=int(port),
            reload=True,
            reload_dirs=["app"],
            log_config=logs.config(settings),
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="on",
            root_path=settings.root_path,
            timeout_graceful_shutdown=1,
        )
    finally:
        metrics.stop()


if __name__ == "__main__":
    main()
