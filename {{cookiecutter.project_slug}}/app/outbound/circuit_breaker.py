"""Circuit breaker: stop calling a failing upstream, except for probes.

One instance for each upstream and process. At intervals, one call probes the upstream. At the
moment of a probe, the packages that we tested let all of 50 waiting calls through, not one.
"""

import contextlib
import logging
import time
from collections.abc import Iterator

from prometheus_client import Gauge

#: Delay before a retry when the circuit is still closed, or its probe is in progress.
RETRY_SECONDS = 0.1
_OPEN = Gauge(
    "circuit_breaker_open",
    "1 while the circuit of an upstream is open.",
    ["upstream"],
    multiprocess_mode="livemax",
)
logger = logging.getLogger("app.breaker")


class CircuitOpenError(Exception):
    """The call was not made. A retry makes sense in `retry_in` seconds."""

    def __init__(self, upstream: str, retry_in: float) -> None:
        super().__init__(f"circuit breaker open: {upstream}")
        self.retry_in = retry_in


class CircuitBreaker:
    """Counts consecutive failures, and opens the circuit at `max_failures`.

    From the first failure on, at most `max_failures` calls get through: a dying upstream gets these
    calls, plus those in flight. Then the circuit is open for `reset_seconds`. Then one call is let
    through (half-open), and its outcome decides. A success closes the circuit and resets the count.
    """

    def __init__(self, upstream: str, max_failures: int = 5, reset_seconds: float = 3.0) -> None:
        self.upstream = upstream
        self.max_failures = max_failures
        self.reset_seconds = reset_seconds
        self.failures = 0
        self.in_flight = 0
        self.is_probing = False
        #: The time of the last failure of an open circuit, by `time.monotonic()`.
        self.opened_at: float | None = None
        _OPEN.labels(upstream).set(0)

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Make a call in this block.

        An exception counts as a failure; a cancellation does not count. Raises `CircuitOpenError`
        if the call must not be made.
        """
        is_probe = self._admit()
        self.in_flight += 1
        try:
            yield
        except Exception:
            self._count_failure(is_probe)
            raise
        else:
            self._count_success(is_probe)
        finally:
            self.in_flight -= 1
            if is_probe:
                self.is_probing = False

    def _admit(self) -> bool:
        """Return whether this call is the probe. Raises `CircuitOpenError`."""
        if self.opened_at is None:
            if self.failures and self.failures + self.in_flight >= self.max_failures:
                raise CircuitOpenError(self.upstream, RETRY_SECONDS)
            return False
        seconds_left = self.opened_at + self.reset_seconds - time.monotonic()
        if seconds_left > 0 or self.is_probing:
            raise CircuitOpenError(self.upstream, max(seconds_left, RETRY_SECONDS))
        self.is_probing = True
        return True

    def _count_failure(self, is_probe: bool) -> None:
        if self.opened_at is not None and not is_probe:
            return  # a call from before the circuit opened: nothing new
        self.failures += 1
        if is_probe or self.failures >= self.max_failures:
            self._set(time.monotonic())

    def _count_success(self, is_probe: bool) -> None:
        if self.opened_at is not None and not is_probe:
            return
        self.failures = 0
        self._set(None)

    def _set(self, opened_at: float | None) -> None:
        """Open or close the circuit; log a change."""
        was_open = self.opened_at is not None
        is_open = opened_at is not None
        if is_open != was_open:
            state = "open" if is_open else "closed"
            logger.warning("circuit breaker %s: %s", state, self.upstream)
        self.opened_at = opened_at
        _OPEN.labels(self.upstream).set(is_open)
