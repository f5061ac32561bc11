"""`python -m app.sizing` explains what this machine runs, and names settings that do not agree with each other."""

import argparse
import math
import os
import sys

from app.settings import load_settings
from app.sizing.checks import REPLICAS, check_settings
from app.sizing.plan import plan_workers
from app.sizing.resources import MEGABYTE, Resources, detect_resources

OVERRIDES = {
    "--workers": "web_concurrency",
    "--timeout": "worker_timeout_seconds",
    "--graceful-timeout": "graceful_timeout_seconds",
    "--drain": "drain_seconds",
    "--grace": "termination_grace_seconds",
    "--max-requests": "max_requests",
    "--postgres-max-connections": "postgres_max_connections",
}


def main() -> int:
    """Explain the plan on stdout; return 1 if something is incoherent."""
    found_here = detect_resources()
    about = "Explain how many workers and connections this service runs here, and what is incoherent (exit 1)."
    parser = argparse.ArgumentParser(prog="python -m app.sizing", description=about)
    parser.add_argument(
        "--cpus", type=float, default=found_here.cpus, help="CPUs (found: %(default)g)"
    )
    parser.add_argument(
        "--memory-mb", type=int, default=found_here.megabytes, help="memory (found: %(default)s)"
    )
    parser.add_argument(
        "--replicas",
        type=int,
        default=REPLICAS,
        help="most pods of a release (default: %(default)s)",
    )
    for option, name in OVERRIDES.items():
        parser.add_argument(option, dest=name.upper(), help=f"another {name.upper()}")
    options = vars(parser.parse_args())
    for name in ("cpus", "memory_mb", "replicas"):
        if not 0 < options[name] < math.inf:
            parser.error(f"--{name.replace('_', '-')} {options[name]}: takes a number over 0")
    os.environ.update(
        {name: value for name, value in options.items() if name.isupper() and value is not None}
    )
    settings, machine = load_settings(), Resources(options["cpus"], options["memory_mb"] * MEGABYTE)
    if machine[:2] == (found_here.cpus, found_here.megabytes * MEGABYTE):
        machine = found_here
    decided = plan_workers(settings, machine)
    found = check_settings(settings, machine, decided.workers, options["replicas"])
    sys.stdout.write(
        f"{machine.cpus:g} CPUs, {machine.megabytes} MB, up to {options['replicas']} pods\n"
        f"workers      {decided.workers}: {decided.explanation}\n"
        f"connections  {settings.database_max_connections} for the pod, {decided.connections_per_worker} per worker\n"
        + (
            "".join(f"WARNING      {text}\n" for text in found)
            or "no warnings: the settings agree with each other\n"
        )
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
