"""Run the service for development: uvicorn with auto-reload in place of gunicorn, the metrics process beside it."""

import os
import signal
import tempfile
from pathlib import Path

os.environ.setdefault("ENVIRONMENT", "development")
os.environ["WEB_CONCURRENCY"] = "1"
os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", tempfile.mkdtemp(prefix="metrics-"))

import uvicorn

from app import log, metrics
from app.settings import load_settings


def main() -> None:
    """Serve until Ctrl-C; a change below `app/` restarts the server."""
    settings = load_settings()
    folder = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
    owner = metrics.prepare(folder)
    pid = metrics.start(settings.metrics_bind, folder)
    host, _, port = settings.bind.rpartition(":")
    try:
        uvicorn.run(
            "app.main:app",
            host=host.strip("[]"),
            port=int(port),
            reload=True,
            reload_dirs=["app"],
            log_config=log.config(settings),
            access_log=False,
            server_header=False,
            lifespan="on",
            root_path=settings.root_path,
            timeout_graceful_shutdown=1,
        )
    finally:
        os.kill(pid, signal.SIGTERM)
        owner.close()


if __name__ == "__main__":
    main()
