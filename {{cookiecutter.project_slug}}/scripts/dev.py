"""Run the service for development: uvicorn with auto-reload in place of gunicorn."""

import contextlib
import os
from pathlib import Path

import uvicorn

from app.settings import load_settings
from app.telemetry import logs, metrics_directory
from scripts.dev_consumer import consuming  # example


def main() -> None:
    """Serve until Ctrl-C. A change in `app/` restarts the server."""
    with contextlib.ExitStack() as stack:
        os.environ["ENVIRONMENT"] = "development"
        os.environ["WEB_CONCURRENCY"] = "1"
        os.environ["DRAIN_SECONDS"] = "0"
        directory = metrics_directory.claim(None)
        stack.callback(directory.release)
        stack.enter_context(consuming())  # example
        serve(directory.path)


def serve(directory: Path) -> None:
    """Run uvicorn with reload, and the metrics process on this directory."""
    # prometheus_client reads PROMETHEUS_MULTIPROC_DIR when it is imported.
    from app.telemetry import metrics_server

    settings = load_settings()
    metrics = metrics_server.MetricsProcess(settings.metrics_bind, directory)
    metrics.ensure()
    try:
        uvicorn.run(
            "app.main:app",
            host=settings.bind.host,
            port=settings.bind.port,
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
