"""The worker: does the jobs that requests have created.

`python -m app.jobs_main` is a process of its own, from the same image, with probes and metrics on
`METRICS_BIND`. Any number of them may run.
"""

from app import process
from app.conversations import jobs as conversations  # conversations
from app.jobs import purge, report
from app.jobs.handlers import handlers
from app.jobs.schedules import schedules
from app.jobs.worker import open_clients, run_worker
from app.settings import load_settings
from app.telemetry import logs

#: The modules that add handlers and schedules, by being imported. Those of a feature belong here.
JOBS = [purge, report]
JOBS += [conversations]  # conversations


def main() -> None:
    """Do jobs until SIGTERM. Raises `SystemExit` for invalid settings and schedules."""
    settings = load_settings()
    logs.configure(settings)
    schedules.check(handlers.by_type)
    process.run_with(settings, open_clients, run_worker, "jobs")


if __name__ == "__main__":
    main()
