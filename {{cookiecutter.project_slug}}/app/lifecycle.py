"""The state of shutdown, which the serving runtime reports to the application.

Without this runtime, as in tests or under another server, nothing is reported.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass


def _never() -> bool:
    return False


@dataclass
class Lifecycle:
    """The shutdown of this process, in `app.state.lifecycle`.

    The serving runtime fills it in; the readiness probe and the background tasks read it. So the
    application knows of its shutdown without importing the server.
    """

    #: Returns whether the whole pod is draining, and not just this worker retiring.
    is_draining: Callable[[], bool] = _never
    #: The time, by `time.monotonic()`, at which background tasks are cancelled.
    closing_deadline: float = 0.0

    def seconds_left(self) -> float:
        """Return the seconds until background tasks are cancelled, negative after it."""
        return self.closing_deadline - time.monotonic()
