"""The worker of the tests without the fence: a start that was superseded ends its job as well."""

import tests.jobs.work  # noqa: F401 - adds the handlers
from app import jobs_main
from app.jobs import outcomes, starts

if __name__ == "__main__":
    starts.LEASE_SECONDS = 2.0
    starts.RENEW_SECONDS = 0.5
    outcomes.FIRST_SECONDS = 0.05
    starts._SUCCEED = starts._SUCCEED.replace(
        "and starts = $2 and status = 'running'", "and $2 > 0"
    )
    jobs_main.main()
