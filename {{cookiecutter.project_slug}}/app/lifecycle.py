"""What the server tells the application about its end; without a server of ours, nothing."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Lifecycle:
    """Lives in `app.state.lifecycle`: the server fills it in, health and the lifespan read it."""

    is_draining: Callable[[], bool] = lambda: False
    closing_deadline: float = 0.0

    def seconds_left(self) -> float:
        """Return how long work in the background may still take."""
        return self.closing_deadline - time.monotonic()
