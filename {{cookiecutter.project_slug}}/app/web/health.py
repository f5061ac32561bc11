"""The probes.

- live: the event loop responds
- startup: the warm-ups have finished
- ready: the required dependencies respond, and the pod is not draining
"""

import asyncio
import contextvars
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from prometheus_client import Gauge

from app.lifecycle import Lifecycle
from app.settings import Settings
from app.tasks import StateLog, describe
from app.web.problems import recent_causes
from app.web.quick_route import QuickRoute

#: For how long a result is reused, so that many kubelets and balancers cost one check.
CACHE_SECONDS = 1.0
#: Time between checks without a probe, so that outages are logged all the same.
WATCH_SECONDS = 5.0

Check = Callable[[], Awaitable[object]]
logger = logging.getLogger("app.health")


class Health:
    """The state of this process and of its dependencies."""

    def __init__(
        self, settings: Settings, checks: Mapping[str, Check], lifecycle: Lifecycle, up: Gauge
    ) -> None:
        """`checks` maps each dependency to a coroutine function that raises if it is unavailable.

        `up` is the gauge that shows the results, by dependency.
        """
        self.settings = settings
        self.checks = checks
        self.lifecycle = lifecycle
        self.up = up
        self.started = False
        self.report: dict[str, dict[str, Any]] = {}
        self.checked_at = float("-inf")
        self.running: asyncio.Task[None] | None = None
        self.state_logs = {
            name: StateLog(logger, f"{name} unavailable", f"{name} available again")
            for name in checks
        }

    async def readiness(self) -> tuple[int, dict[str, Any]]:
        """Return status and body of the readiness probe; never raises.

        The checks in it are at most about a second old.
        """
        if self.lifecycle.is_draining():
            return 503, {"status": "draining", "checks": self.report}
        await self.refresh()
        if self.started and all(map(self._is_healthy, self.settings.readiness_required)):
            return 200, {"status": "ready", "checks": self.report}
        return 503, {"status": "not_ready", "checks": self.report}

    async def is_ready(self) -> bool:
        """Return whether the readiness probe would respond with 200."""
        status, _ = await self.readiness()
        return status == 200

    async def refresh(self) -> None:
        """Check every dependency, at most once in `CACHE_SECONDS`; callers share a check."""
        if time.monotonic() - self.checked_at < CACHE_SECONDS:
            return
        if self.running is None or self.running.done():
            # An empty context: its log lines do not belong to the request that started it.
            self.running = asyncio.create_task(self._check_all(), context=contextvars.Context())
        # Shielded: a caller that disconnects does not cancel the check of the others.
        await asyncio.shield(self.running)

    async def watch(self) -> None:
        """Check until cancelled, so that a change is logged without a probe.

        The last check finishes before this returns.
        """
        try:
            while True:
                await self.refresh()
                await asyncio.sleep(WATCH_SECONDS)
        finally:
            if self.running is not None:
                await asyncio.wait([self.running])

    def _is_healthy(self, name: str) -> bool:
        return bool(self.report[name]["status"] == "healthy")

    async def _check_all(self) -> None:
        checks = [self._check(name, check) for name, check in self.checks.items()]
        results = await asyncio.gather(*checks)
        self.report = dict(zip(self.checks, results, strict=True))
        self.checked_at = time.monotonic()

    async def _check(self, name: str, check: Check) -> dict[str, Any]:
        start = time.perf_counter()
        state_log = self.state_logs[name]
        try:
            async with asyncio.timeout(self.settings.readiness_timeout_seconds):
                await check()
        except Exception as error:  # noqa: BLE001 - whatever it is, the dependency is unhealthy
            self._log_failure(name, error)
        else:
            state_log.succeeded(dependency=name, reason=None)
        self.up.labels(name).set(not state_log.is_failing)
        status = "unhealthy" if state_log.is_failing else "healthy"
        milliseconds = (time.perf_counter() - start) * 1000
        return {"status": status, "latency_ms": round(milliseconds, 3)}

    def _log_failure(self, name: str, error: Exception) -> None:
        """Log that a dependency is unavailable: when it becomes so, and when the cause changes."""
        cause = describe(error)
        extra = {"dependency": name, "reason": type(error).__name__}
        is_new = recent_causes.is_new(cause)
        if not self.state_logs[name].is_failing:
            self.state_logs[name].failed(cause, **extra)
        elif is_new:
            logger.warning("%s still unavailable: %s", name, cause, extra=extra)


router = APIRouter(prefix="/health", tags=["health"], route_class=QuickRoute)


def _respond(status: int, body: Mapping[str, Any]) -> Response:
    headers = {"Cache-Control": "no-store"}
    return Response(orjson.dumps(body), status, headers, "application/json")


@router.get("/live")
async def live() -> Response:
    """Liveness: the event loop responds.

    No dependency is checked, or an outage would restart every pod.
    """
    return _respond(200, {"status": "alive"})


@router.get("/startup", responses={503: {"description": "Still starting"}})
async def startup(request: Request) -> Response:
    """Startup: the warm-ups have finished. An unavailable dependency does not delay it."""
    health: Health = request.state.health
    if health.started:
        return _respond(200, {"status": "started"})
    return _respond(503, {"status": "starting"})


@router.get("/ready", responses={503: {"description": "Not ready, or draining"}})
async def ready(request: Request) -> Response:
    """Readiness: the required dependencies respond, and the pod is not draining."""
    health: Health = request.state.health
    status, body = await health.readiness()
    return _respond(status, body)
