"""The configuration of gunicorn, which reads it when started in this directory.

Every value comes from the environment, see app/settings.py.
"""

import atexit
import sys
from logging import getLogger
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from app.settings import OPEN, fail, load_settings
from app.sizing.plan import plan_workers
from app.sizing.resources import detect_resources
from app.telemetry import logs, metrics_directory

settings = load_settings()
logs.configure(settings)
logs.capture_prints(settings)
plan = plan_workers(settings, detect_resources())

# prometheus_client chooses between files and memory when it is imported, and the application may
# have metrics at module level. So this comes first.
directory = metrics_directory.claim(settings.prometheus_multiproc_dir)
atexit.register(directory.release)
memory_directory = metrics_directory.memory_directory()

from app import auth  # noqa: E402
from app.serving.arbiter import use_service_arbiter  # noqa: E402
from app.serving.memory import share_memory  # noqa: E402
from app.telemetry import trace_setup  # noqa: E402
from app.telemetry.metrics_server import MetricsProcess  # noqa: E402
from app.telemetry.pod_metrics import MasterMetrics  # noqa: E402
from app.web.body_limit import check_routes  # noqa: E402

# The application
wsgi_app = "app.main:app"
proc_name = settings.service_name
# Loaded once in the master: saves 15-18 MB per worker.
preload_app = True

# Workers
worker_class = "app.serving.gunicorn_worker.ServiceWorker"
workers = plan.workers
# The heartbeat does not wait for a disk.
worker_tmp_dir = str(memory_directory) if memory_directory else None
timeout = settings.worker_timeout_seconds
graceful_timeout = settings.graceful_timeout_seconds
max_requests = settings.max_requests
max_requests_jitter = settings.max_requests_jitter

# Connections
bind = settings.bind
# Longer than the proxy's idle timeout, or the proxy reuses a connection that is being closed.
keepalive = settings.keepalive_seconds
forwarded_allow_ips = settings.forwarded_allow_ips

# The control socket is a thread in a master that forks, and needs a writable home directory.
control_socket_disable = True

# Logs
logconfig_dict = logs.config(settings)
errorlog = None


def on_starting(arbiter: Any) -> None:
    """Start the metrics process, and log the size of the pod.

    Raises `SystemExit` with one line for options of gunicorn that the service cannot follow, and
    for limits of routes that contradict the settings.
    """
    if arbiter.cfg.is_ssl:
        fail("--certfile/--keyfile", None, "not supported: end TLS in the proxy or service mesh")
    check_routes(arbiter.app.wsgi(), settings)
    trace_setup.preload(settings)
    auth.preload(settings)
    share_memory()
    arbiter.metrics_of_workers = MasterMetrics(settings)
    arbiter.metrics = MetricsProcess(settings.metrics_bind, directory.path, settings.metrics_prefix)
    arbiter.metrics.ensure()
    atexit.register(arbiter.metrics.stop)
    getLogger("app.sizing").info(
        "%d workers with %d database connections each: %s; metrics on %s",
        plan.workers,
        plan.connections_per_worker,
        plan.explanation,
        settings.metrics_bind,
    )
    if settings.is_open:
        getLogger("app.auth").warning(OPEN)


def when_ready(arbiter: Any) -> None:
    """Turn gunicorn's arbiter into the service's own once it listens."""
    use_service_arbiter(arbiter)


def pre_fork(arbiter: Any, worker: Any) -> None:
    """Keep memory shared with the worker that is about to be forked."""
    share_memory()


def child_exit(arbiter: Any, worker: Any) -> None:
    """Count the exit of a worker, and log its stacks if it timed out or crashed."""
    try:
        arbiter.metrics_of_workers.exits.labels(worker.exit_reason()).inc()
        worker.log_crash_stacks()
    except Exception:  # would stop the master, and the service with it
        getLogger("app.worker").exception("cannot report the exit of worker %s", worker.pid)
