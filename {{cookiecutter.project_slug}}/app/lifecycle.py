"""The state of shutdown, which the serving runtime reports to the application.

Without this runtime, as in tests or under another server, nothing is reported.
"""

import math
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
    #: The time, by `time.monotonic()`, at which requests and background tasks are cancelled. The
    #: serving runtime sets it to infinity until shutdown.
    closing_deadline: float = 0.0

    def seconds_left(self) -> float:
        """Return the seconds until background tasks are cancelled, negative after it."""
        return self.closing_deadline - time.monotonic()

    def may_cancel_requests(self) -> bool:
        """Return whether a cancellation can be the server's: shutdown, or another server's."""
        return self.closing_deadline < math.inf


#: The lifecycle of this process. Not the application's own: a team may wrap the application in
#: another, through which the serving runtime cannot reach it.
PROCESS = Lifecycle()
