"""What `gunicorn` reads when it is started in this directory. Everything comes from the environment: app/settings.py."""

import atexit
import os
import secrets
import shutil
import sys
import tempfile
from logging import getLogger
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from app.settings import load_settings
from app.sizing.plan import plan_workers
from app.sizing.resources import detect_resources
from app.telemetry import logs

settings = load_settings()
logs.configure(settings)
plan = plan_workers(settings, detect_resources())

# prometheus_client chooses between files and memory when it is imported, so the folder must be known before that.
shared_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - files that never touch a disk
own_directory = Path(
    shared_memory or tempfile.gettempdir(), f"metrics-{os.getpid()}-{secrets.token_hex(8)}"
)
directory = settings.prometheus_multiproc_dir or own_directory
os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)

from app.serving import arbiter as arbiter_module  # noqa: E402
from app.serving import memory  # noqa: E402
from app.telemetry import metrics_server, multiprocess  # noqa: E402

wsgi_app = "app.main:app"
worker_class = "app.serving.gunicorn_worker.ServiceWorker"
workers = plan.workers
bind = settings.bind
preload_app = True  # shares 15-18 MB per worker
worker_tmp_dir = shared_memory  # the heartbeat must not wait for a disk
timeout = settings.worker_timeout_seconds
graceful_timeout = settings.graceful_timeout_seconds
keepalive = (
    settings.keepalive_seconds
)  # longer than a proxy's idle time, or it reuses what we are closing
max_requests = settings.max_requests
max_requests_jitter = settings.max_requests_jitter
forwarded_allow_ips = settings.forwarded_allow_ips
control_socket_disable = (
    True  # a thread in a master that forks, and it needs a home that can be written to
)
logconfig_dict = logs.config(settings)
errorlog = None
proc_name = settings.service_name


def on_starting(arbiter: Any) -> None:
    """Start the metrics process, and say how the pod is sized."""
    memory.share_memory()
    arbiter.metrics = metrics_server.MetricsProcess(settings.metrics_bind, directory)
    arbiter.metrics.ensure()
    atexit.register(clean_up, os.getpid(), arbiter.metrics)
    text = "%d workers, %d database connections for each: %s; metrics on %s"
    getLogger("app.sizing").info(
        text, plan.workers, plan.connections_per_worker, plan.explanation, settings.metrics_bind
    )


def when_ready(arbiter: Any) -> None:
    """Make the master ours once it listens."""
    arbiter_module.use_service_arbiter(arbiter)


def pre_fork(arbiter: Any, worker: Any) -> None:
    """Share with the workers what is loaded."""
    memory.share_memory()


def child_exit(arbiter: Any, worker: Any) -> None:
    """Keep the counts of a worker that ended, and say what it was doing if it was stuck."""
    try:
        worker.log_crash_stacks()
        multiprocess.archive_worker(directory, worker.pid)
    except Exception:  # it would end the master, and the service with it
        getLogger("app.metrics").exception("what worker %s has counted is lost", worker.pid)


def clean_up(master_pid: int, metrics: metrics_server.MetricsProcess) -> None:
    """End what was started here, however the master ends; workers inherit this and leave it alone."""
    if os.getpid() == master_pid:
        metrics.stop()
        if directory == own_directory:
            shutil.rmtree(directory, ignore_errors=True)
