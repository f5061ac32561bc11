"""The probes. Only readiness checks the dependencies, with a bounded delay."""

import asyncio
import logging

import pytest
from prometheus_client import Gauge

from app.lifecycle import Lifecycle
from app.lifespan import State, open_state
from app.main import create_app
from app.settings import Settings
from app.web import health
from app.web.health import Health
from tests.conftest import InProcess


async def healthy() -> None:
    """A dependency that responds."""


async def failing() -> None:
    """A dependency that fails, with a text that no client may see."""
    raise OSError("no route")


async def hung() -> None:
    """A dependency that does not respond."""
    await asyncio.sleep(60)


def started_health(*checks: health.Check, **settings: object) -> Health:
    """Return the health of a started process; `checks`: of Postgres, then of Redis."""
    found = Health(
        Settings(**settings),  # type: ignore[arg-type]
        dict(zip(("postgres", "redis"), checks, strict=False)),
        Lifecycle(),
        Gauge("up", "", ["dependency"], registry=None),
    )
    found.started = True
    return found


async def test_readiness_reports_each_dependency() -> None:
    status, body = await started_health(healthy, healthy).readiness()
    assert status == 200
    assert body["status"] == "ready"
    statuses = {name: check["status"] for name, check in body["checks"].items()}
    assert statuses == {"postgres": "healthy", "redis": "healthy"}
    assert body["checks"]["postgres"]["latency_ms"] >= 0


@pytest.mark.parametrize(
    ("checks", "required", "status"),
    [
        ((failing, healthy), ("postgres",), 503),
        ((healthy, failing), ("postgres",), 200),
        ((healthy, failing), ("postgres", "redis"), 503),
        ((failing, failing), (), 200),
    ],
)
async def test_only_required_dependencies_affect_readiness(
    checks: tuple[health.Check, ...], required: tuple[str, ...], status: int
) -> None:
    found, body = await started_health(*checks, readiness_required=required).readiness()
    assert found == status
    assert "no route" not in str(body)
    assert body["status"] == ("ready" if status == 200 else "not_ready")


async def test_dependencies_are_checked_concurrently() -> None:
    """Two hung ones cost one timeout. Here each is healthy once the other has started."""
    both_started = asyncio.Barrier(2)

    async def meet() -> None:
        await both_started.wait()

    status, _ = await started_health(meet, meet, readiness_timeout_seconds=10).readiness()
    assert status == 200


async def test_concurrent_probes_share_one_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "CACHE_SECONDS", 60.0)
    calls = 0

    async def count_calls() -> None:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.01)

    found = started_health(count_calls)
    await asyncio.gather(*(found.readiness() for _ in range(50)))
    await found.readiness()
    assert calls == 1
    found.checked_at -= health.CACHE_SECONDS
    await found.readiness()
    assert calls == 2


async def test_cancelled_probe_does_not_cancel_the_shared_check() -> None:
    found = started_health(lambda: asyncio.sleep(0.05))
    first = asyncio.create_task(found.readiness())
    second = asyncio.create_task(found.readiness())
    await asyncio.sleep(0.01)
    first.cancel()
    status, _ = await second
    assert status == 200


async def test_change_of_state_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "app.health")
    checks = [failing, failing, healthy, healthy, failing]
    found = started_health(lambda: checks[0]())
    while checks:
        found.checked_at = float("-inf")
        await found.refresh()
        checks.pop(0)
    assert caplog.messages == [
        "postgres unavailable: OSError: no route",
        "postgres available again",
        "postgres unavailable: OSError: no route",
    ]


async def test_change_of_cause_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "app.health")
    errors = [
        OSError("first cause"),
        OSError("second cause\nDETAIL: a row"),
        OSError("second cause"),
    ]

    async def fail() -> None:
        raise errors[0]

    found = started_health(fail)
    while errors:
        found.checked_at = float("-inf")
        await found.refresh()
        errors.pop(0)
    assert caplog.messages == [
        "postgres unavailable: OSError: first cause",
        "postgres still unavailable: OSError: second cause",
    ]


async def test_draining_process_is_unready_without_checks() -> None:
    found = started_health(hung)
    found.lifecycle.is_draining = lambda: True
    assert await found.readiness() == (503, {"status": "draining", "checks": {}})


async def test_startup_waits_for_warm_ups_but_liveness_does_not(settings: Settings) -> None:
    is_loaded = asyncio.Event()

    async def load(state: State) -> None:
        assert state["settings"] is settings
        await is_loaded.wait()

    async with InProcess(create_app(settings, [load])) as client:
        starting = await client.get("/health/startup")
        assert starting.status_code == 503
        assert starting.json() == {"status": "starting"}
        assert (await client.get("/health/live")).json() == {"status": "alive"}
        assert (await client.get("/health/ready")).json()["status"] == "not_ready"

        is_loaded.set()
        await asyncio.sleep(0.01)
        started = await client.get("/health/startup")
        assert started.status_code == 200
        assert started.json() == {"status": "started"}
        assert started.headers["cache-control"] == "no-store"
        assert (await client.get("/health/ready")).json()["status"] == "ready"


async def test_failed_warm_up_keeps_the_process_starting(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(_: State) -> None:
        raise RuntimeError("no model")

    async with open_state(settings, [fail]) as state:
        await asyncio.sleep(0.01)
        assert not state["health"].started
    assert "warm-up failed, this process stays in `starting`" in caplog.messages
