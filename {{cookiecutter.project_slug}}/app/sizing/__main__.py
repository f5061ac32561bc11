"""`python -m app.sizing` shows the plan for this machine, and any conflicts."""

import argparse
import math
import os
import sys

from app.settings import OPEN, Settings, load_settings
from app.sizing.checks import WORKERS_OF_A_RELEASE, check_settings, default_replicas
from app.sizing.plan import Plan, metrics_bytes, plan_workers
from app.sizing.resources import MEGABYTE, Resources, detect_resources

DESCRIPTION = (
    "Show the workers and connections that this service would run here, and the settings that "
    "conflict. The exit code is 1 if any do."
)
#: The options that replace a setting.
OVERRIDES = {
    "--workers": "WEB_CONCURRENCY",
    "--timeout": "WORKER_TIMEOUT_SECONDS",
    "--graceful-timeout": "GRACEFUL_TIMEOUT_SECONDS",
    "--drain": "DRAIN_SECONDS",
    "--grace": "TERMINATION_GRACE_SECONDS",
    "--max-requests": "MAX_REQUESTS",
    "--postgres-max-connections": "POSTGRES_MAX_CONNECTIONS",
}


def main() -> int:
    """Show the plan on stdout; return 1 if settings conflict."""
    detected = detect_resources()
    options = _parser(detected).parse_args()
    for name in OVERRIDES.values():
        value = getattr(options, name)
        if value is not None:
            os.environ[name] = value
    settings = load_settings()
    resources = _override(detected, options.cpus, options.memory_mb)
    plan = plan_workers(settings, resources)
    replicas = options.replicas or default_replicas(plan.workers)
    problems = _problems(settings, resources, plan.workers, replicas)

    size = f"{resources.cpus:g} CPUs, {resources.megabytes} MB"
    lines = [
        f"{size}, up to {replicas} pods",
        f"workers      {plan.workers}: {plan.explanation}",
        f"connections  {_describe_connections(plan)}",
    ]
    if resources.shared_memory_bytes is not None:
        needed = math.ceil(metrics_bytes(settings, plan.workers) / MEGABYTE)
        available = resources.shared_memory_bytes // MEGABYTE
        lines.append(f"metrics      up to {needed} MB of /dev/shm, which has {available} MB")
    lines += [f"WARNING      {problem}" for problem in problems]
    if not problems:
        lines.append("no warnings: the settings agree with each other")
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if problems else 0


def _describe_connections(plan: Plan) -> str:
    text = (
        f"{plan.connections_per_pod} per pod, {plan.connections_per_worker} per worker: "
        f"{plan.primary_connections - 1} for requests, 1 for the readiness probe"
    )
    if plan.replica_connections:
        text += f", {plan.replica_connections - 1} to the read replica, 1 for its check"
    return text


def _problems(settings: Settings, resources: Resources, workers: int, replicas: int) -> list[str]:
    problems = check_settings(settings, resources, workers, replicas)
    return [*problems, OPEN] if settings.is_open else problems


def _parser(detected: Resources) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.sizing", description=DESCRIPTION)
    cpus = f"number of CPUs (detected: {detected.cpus:g})"
    parser.add_argument("--cpus", type=_number, metavar="N", help=cpus)
    memory = f"memory in MB (detected: {detected.megabytes})"
    parser.add_argument("--memory-mb", type=_whole_number, metavar="N", help=memory)
    replicas = f"maximum number of pods of a release (default: {WORKERS_OF_A_RELEASE} workers)"
    parser.add_argument("--replicas", type=_whole_number, metavar="N", help=replicas)
    for option, name in OVERRIDES.items():
        parser.add_argument(option, dest=name, metavar="N", help=f"value of {name}")
    return parser


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        msg = f"{text}: must be a number greater than 0"
        raise argparse.ArgumentTypeError(msg)
    return number


def _whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        msg = f"{text}: must be a whole number greater than 0"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def _override(detected: Resources, cpus: float | None, memory_mb: int | None) -> Resources:
    """Return the resources, with those that are given in place of those detected."""
    resources = detected
    if cpus is not None:
        resources = resources._replace(cpus=cpus, cpu_source="given")
    if memory_mb is not None:
        memory_bytes = memory_mb * MEGABYTE
        resources = resources._replace(memory_bytes=memory_bytes, memory_source="given")
    return resources


if __name__ == "__main__":
    sys.exit(main())
