"""The worker with the handlers of the tests, and with the pauses that a test has set."""

import os

import tests.jobs.work  # noqa: F401 - adds the handlers
from app import jobs_main
from app.jobs import outcomes, starts
from app.jobs.schedules import schedules

if __name__ == "__main__":
    starts.LEASE_SECONDS = float(os.environ.get("TEST_LEASE_SECONDS", starts.LEASE_SECONDS))
    starts.RENEW_SECONDS = starts.LEASE_SECONDS / 4
    outcomes.FIRST_SECONDS = 0.05
    if expression := os.environ.get("TEST_SCHEDULE"):
        schedules.add("wait", expression)
    jobs_main.main()
