"""The worker with the handlers of the tests, and with the pauses that a test has set."""

import os

import tests.jobs.work  # noqa: F401 - adds the handlers
from app import jobs_main
from app.jobs import outcomes, relay, starts
from app.jobs.schedules import schedules


def main() -> None:
    """Do jobs until SIGTERM."""
    if lease := os.environ.get("TEST_LEASE_SECONDS"):
        starts.LEASE_SECONDS = float(lease)
        starts.RENEW_SECONDS = starts.LEASE_SECONDS / 4
        relay.RECOVER_SECONDS = starts.LEASE_SECONDS / 4
    outcomes.FIRST_SECONDS = 0.05
    if expression := os.environ.get("TEST_SCHEDULE"):
        schedules.add("wait", expression)
    jobs_main.main()


if __name__ == "__main__":
    main()
