"""The probes: live (the process answers), startup (its own initialisation is done), ready (send traffic here)."""

import asyncio
import contextvars
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from prometheus_client import Gauge

from app.settings import Settings

CACHE_SECONDS = 1.0  # for which a result stands, so that many kubelets and balancers cost one check
WATCH_SECONDS = 5.0  # between checks when nobody probes, so that outages are logged all the same

Check = Callable[[], Awaitable[object]]
logger = logging.getLogger("app.health")


class Health:
    """What this process knows of itself and of its dependencies."""

    def __init__(
        self,
        settings: Settings,
        checks: Mapping[str, Check],
        draining: Callable[[], bool],
        up: Gauge,
    ) -> None:
        """Take, for each dependency, a coroutine function that raises when it does not answer; `up` shows it."""
        self.settings, self.checks, self.draining, self.up = settings, checks, draining, up
        self.started = False
        self.report: dict[str, dict[str, Any]] = {}
        self.checked_at = float("-inf")
        self.running: asyncio.Task[None] | None = None

    async def readiness(self) -> tuple[int, dict[str, Any]]:
        """Return status and body of the readiness probe. A result is about a second old at most; never raises."""
        if self.draining():
            return 503, {"status": "draining", "checks": self.report}
        await self.refresh()
        required = all(
            self.report[name]["status"] == "healthy" for name in self.settings.readiness_required
        )
        ready = self.started and required
        return (200 if ready else 503), {
            "status": "ready" if ready else "not_ready",
            "checks": self.report,
        }

    async def refresh(self) -> None:
        """Check every dependency, unless that was done within `CACHE_SECONDS`; callers share a check under way."""
        if time.monotonic() - self.checked_at < CACHE_SECONDS:
            return
        if self.running is None or self.running.done():
            # Its lines are not those of the request that happened to come by.
            self.running = asyncio.create_task(self._check_all(), context=contextvars.Context())
        await asyncio.shield(
            self.running
        )  # a caller that leaves does not take the others' check along

    async def _check_all(self) -> None:
        results = await asyncio.gather(
            *(self._check(name, check) for name, check in self.checks.items())
        )
        self.report = dict(zip(self.checks, results, strict=True))
        self.checked_at = time.monotonic()

    async def _check(self, name: str, check: Check) -> dict[str, Any]:
        start, reason = time.perf_counter(), None
        try:
            async with asyncio.timeout(self.settings.readiness_timeout_seconds):
                await check()
        except Exception as error:  # noqa: BLE001 - whatever it is, the dependency is not healthy
            reason = type(error).__name__
        was, now = (
            self.report.get(name, {}).get("status", "healthy"),
            "unhealthy" if reason else "healthy",
        )
        if now != was:  # one line per change of state, not per try
            level = logging.WARNING if reason else logging.INFO
            logger.log(level, "%s is %s", name, now, extra={"dependency": name, "reason": reason})
        self.up.labels(name).set(not reason)
        return {"status": now, "latency_ms": round((time.perf_counter() - start) * 1000, 3)}

    async def watch(self) -> None:
        """Check until cancelled, so that changes of state are seen without a probe; let the last check finish."""
        try:
            while True:
                await self.refresh()
                await asyncio.sleep(WATCH_SECONDS)
        finally:
            if self.running is not None:
                await asyncio.wait([self.running])


router = APIRouter(prefix="/health", tags=["health"])


def _answer(status: int, body: Mapping[str, Any]) -> Response:
    return Response(orjson.dumps(body), status, {"Cache-Control": "no-store"}, "application/json")


@router.get("/live")
async def live() -> Response:
    """Liveness: the event loop answers. It touches no dependency, or an outage would restart every pod."""
    return _answer(200, {"status": "alive"})


@router.get("/startup", responses={503: {"description": "Still starting"}})
async def startup(request: Request) -> Response:
    """Startup: warm-ups are done. A dependency that is away does not hold it back."""
    return (
        _answer(200, {"status": "started"})
        if request.state.health.started
        else _answer(503, {"status": "starting"})
    )


@router.get("/ready", responses={503: {"description": "Not ready, or draining"}})
async def ready(request: Request) -> Response:
    """Readiness: every required dependency answers, and the process is not draining."""
    return _answer(*await request.state.health.readiness())
