"""Requests to several instances, as a balancer sends them.

It keeps connections open, probes readiness, and sends each request to the next instance that is
ready. Like a Service of Kubernetes it repeats no request: to repeat a payment is not its decision.
"""

import asyncio
import itertools
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import httpx

#: An instance gets no requests after this number of failed probes, as with most balancers.
FAILURES = 2
PROBE_TIMEOUT_SECONDS = 1.0
REQUEST_TIMEOUT_SECONDS = 10.0


class Outcome(NamedTuple):
    """A request: when it was sent, to which instance, and its status, or the error in words."""

    at: float
    target: int
    status: int
    error: str

    @property
    def is_lost(self) -> bool:
        """Whether the client got no response: the connection was refused or closed."""
        return self.status == 0

    @property
    def is_rejected(self) -> bool:
        """Whether the response is a 503: the machine is too busy for this lab."""
        return self.status >= 500


class Target:
    """An instance as the balancer sees it."""

    def __init__(self, number: int, url: str) -> None:
        self.number = number
        self.is_ready = True
        self.failures = 0
        #: When it became ready or not, by the balancer's clock.
        self.changes: list[tuple[float, bool]] = [(0.0, True)]
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=20)
        self.client = httpx.AsyncClient(
            base_url=url, limits=limits, timeout=REQUEST_TIMEOUT_SECONDS, trust_env=False
        )
        # A probe has a connection of its own: kubelets and balancers do not reuse it.
        self.probes = httpx.AsyncClient(
            base_url=url,
            headers={"Connection": "close"},
            timeout=PROBE_TIMEOUT_SECONDS,
            trust_env=False,
        )


class Balancer:
    """Sends requests to instances; `outcomes` has each of them."""

    def __init__(self, urls: list[str], probe_seconds: float) -> None:
        self.targets = [Target(number, url) for number, url in enumerate(urls)]
        self.probe_seconds = probe_seconds
        self.outcomes: list[Outcome] = []
        self.started_at = time.monotonic()
        self._turns = itertools.count()

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started_at

    async def send(self, method: str, path: str, **options: Any) -> None:
        """Send a request to the next instance that is ready, once."""
        ready = [target for target in self.targets if target.is_ready]
        at = self.now
        if not ready:
            self.outcomes.append(Outcome(at, -1, 503, "no instance is ready"))
            return
        target = ready[next(self._turns) % len(ready)]
        status = 0
        error = ""
        try:
            response = await target.client.request(method, path, **options)
            status = response.status_code
        except httpx.HTTPError as failure:
            error = _describe(failure)
        self.outcomes.append(Outcome(at, target.number, status, error))

    async def watch(self) -> None:
        """Probe all instances until it is canceled."""
        async with asyncio.TaskGroup() as tasks:
            for target in self.targets:
                tasks.create_task(self._watch(target))

    async def _watch(self, target: Target) -> None:
        while True:
            try:
                response = await target.probes.get("/health/ready")
                is_good = response.status_code == 200
            except httpx.HTTPError:
                is_good = False
            target.failures = 0 if is_good else target.failures + 1
            is_ready = target.failures < FAILURES
            if is_ready != target.is_ready:
                target.is_ready = is_ready
                target.changes.append((self.now, is_ready))
            await asyncio.sleep(self.probe_seconds)

    async def close(self) -> None:
        """Close all connections."""
        for target in self.targets:
            await target.client.aclose()
            await target.probes.aclose()

    async def load(self, seconds_between: float, requests: "itertools.count[int]") -> None:
        """Send payments at a constant rate until it is canceled; the last ones are finished."""
        async with asyncio.TaskGroup() as tasks:
            start = self.now
            for number in itertools.count():
                tasks.create_task(self.send("POST", "/payments", **payment(next(requests))))
                try:
                    await asyncio.sleep(start + (number + 1) * seconds_between - self.now)
                except asyncio.CancelledError:
                    return


def payment(number: int) -> Mapping[str, Any]:
    """Return a request for a new payment."""
    body = {"amount": 1250, "currency": "EUR", "reference": f"order-{number}"}
    return {"json": body, "headers": {"Idempotency-Key": f"lab-{number}"}}


def _describe(error: httpx.HTTPError) -> str:
    """Return the words for an error that a balancer would log."""
    if isinstance(error, httpx.ConnectError):
        return "connection refused"
    if isinstance(error, httpx.TimeoutException):
        return "no response in time"
    return "connection closed before the response"
