"""Circuit breaker: an upstream that is down is left alone, but for one call now and then that looks whether it is back.

One for each upstream and process. Packages that were tried let all of 50 waiting calls through at that moment, not one.
"""

import contextlib
import logging
import time
from collections.abc import Iterator

from prometheus_client import Gauge

_STATE = Gauge(
    "circuit_breaker_open",
    "1 while an upstream is left alone.",
    ["upstream"],
    multiprocess_mode="livemax",
)
logger = logging.getLogger("app.breaker")


class CircuitOpenError(Exception):
    """The upstream is left alone; `retry_in` is the seconds after which it makes sense to ask again."""

    def __init__(self, upstream: str, retry_in: float) -> None:
        super().__init__(f"{upstream} is left alone")
        self.retry_in = retry_in


class CircuitBreaker:
    """Counts failures in a row. From the first on, no more calls get through than `failures` in all.

    So an upstream that dies is called `failures` times, and by those that were under way; then it is left alone (open)
    for `reset_seconds`; then one call is let through (half-open), which decides. A success forgets them all (closed).
    """

    def __init__(self, upstream: str, failures: int = 5, reset_seconds: float = 3.0) -> None:
        self.upstream, self.failures, self.reset_seconds = upstream, failures, reset_seconds
        self.failed = self.under_way = 0
        self.opened_at: float | None = None
        self.is_probing = False
        _STATE.labels(upstream).set(0)

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Make a call in this block, or raise `CircuitOpenError`. What it raises is a failure; a cancellation says nothing."""
        is_probe = self._admit()
        self.under_way += 1
        try:
            yield
        except Exception:
            if is_probe or self.opened_at is None:  # else it is of before, and known
                self.failed += 1
                if is_probe or self.failed >= self.failures:
                    self._set(time.monotonic())
            raise
        else:
            if is_probe or self.opened_at is None:
                self.failed = 0
                self._set(None)
        finally:
            self.under_way -= 1
            if is_probe:
                self.is_probing = False

    def _admit(self) -> bool:
        """Return whether this call is the one that looks; raise `CircuitOpenError` if it must not be made."""
        if self.opened_at is None:
            if self.failed and self.failed + self.under_way >= self.failures:
                raise CircuitOpenError(self.upstream, 0.1)
            return False
        left = self.opened_at + self.reset_seconds - time.monotonic()
        if left > 0 or self.is_probing:
            raise CircuitOpenError(self.upstream, max(left, 0.1))
        self.is_probing = True
        return True

    def _set(self, opened_at: float | None) -> None:
        if (opened_at is None) != (self.opened_at is None):
            logger.warning(
                "%s %s", self.upstream, "is left alone" if opened_at else "is called again"
            )
        self.opened_at = opened_at
        _STATE.labels(self.upstream).set(opened_at is not None)
