"""Probes: cheap, bounded, and about this process; readiness alone looks at dependencies."""

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


def checker(*checks: health.Check, **settings: object) -> Health:
    """Return a started Health with checks named postgres and redis, in that order."""
    chosen = Settings(**settings)  # type: ignore[arg-type]
    found = Health(
        chosen,
        dict(zip(("postgres", "redis"), checks, strict=False)),
        Lifecycle(),
        Gauge("up", "", ["dependency"], registry=None),
    )
    found.started = True
    return found


async def well() -> None:
    """A dependency that answers."""


async def broken() -> None:
    raise OSError("secret")


async def frozen() -> None:
    await asyncio.sleep(60)


async def test_ready_names_each_dependency() -> None:
    status, body = await checker(well, well).readiness()
    assert (status, body["status"]) == (200, "ready")
    assert {name: check["status"] for name, check in body["checks"].items()} == {
        "postgres": "healthy",
        "redis": "healthy",
    }
    assert body["checks"]["postgres"]["latency_ms"] >= 0


@pytest.mark.parametrize(
    ("checks", "required", "status"),
    [
        ((broken, well), ("postgres",), 503),
        ((well, broken), ("postgres",), 200),
        ((well, broken), ("postgres", "redis"), 503),
        ((broken, broken), (), 200),
    ],
)
async def test_only_what_is_required_decides(
    checks: tuple[health.Check, ...], required: tuple[str, ...], status: int
) -> None:
    found, body = await checker(*checks, readiness_required=required).readiness()
    assert found == status
    assert "secret" not in str(body)
    assert body["status"] == ("ready" if status == 200 else "not_ready")


async def test_a_frozen_dependency_costs_its_timeout_once_for_all() -> None:
    loop = asyncio.get_running_loop()
    start = loop.time()
    status, _ = await checker(frozen, frozen, readiness_timeout_seconds=1).readiness()
    assert status == 503
    assert loop.time() - start < 1.9  # not 2: the checks run side by side


async def test_many_probes_share_one_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "CACHE_SECONDS", 60.0)
    calls = 0

    async def counted() -> None:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.01)

    found = checker(counted)
    await asyncio.gather(*(found.readiness() for _ in range(50)))
    await found.readiness()
    assert calls == 1
    found.checked_at -= health.CACHE_SECONDS
    await found.readiness()
    assert calls == 2


async def test_a_probe_that_leaves_does_not_take_the_check_along() -> None:
    found = checker(lambda: asyncio.sleep(0.05))
    first, second = asyncio.create_task(found.readiness()), asyncio.create_task(found.readiness())
    await asyncio.sleep(0.01)
    first.cancel()
    assert (await second)[0] == 200


async def test_a_change_of_state_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "app.health")
    state = [broken, broken, well, well, broken]
    found = checker(lambda: state[0]())
    while state:
        found.checked_at = float("-inf")
        await found.refresh()
        state.pop(0)
    assert caplog.messages == [
        "postgres unavailable: OSError",
        "postgres available again",
        "postgres unavailable: OSError",
    ]


async def test_a_draining_process_says_so_and_asks_nobody() -> None:
    found = checker(frozen)
    found.lifecycle.is_draining = lambda: True
    assert await found.readiness() == (503, {"status": "draining", "checks": {}})


async def test_startup_waits_for_warm_ups_and_liveness_does_not(settings: Settings) -> None:
    loaded = asyncio.Event()

    async def load(state: State) -> None:
        assert state["settings"] is settings
        await loaded.wait()

    async with InProcess(create_app(settings, [load])) as client:
        starting = await client.get("/health/startup")
        assert (starting.status_code, starting.json()) == (503, {"status": "starting"})
        assert (await client.get("/health/live")).json() == {"status": "alive"}
        assert (await client.get("/health/ready")).json()["status"] == "not_ready"
        loaded.set()
        await asyncio.sleep(0.01)
        started = await client.get("/health/startup")
        assert (started.status_code, started.json()) == (200, {"status": "started"})
        assert (await client.get("/health/ready")).json()["status"] == "ready"
        assert started.headers["cache-control"] == "no-store"


async def test_a_failed_warm_up_keeps_the_process_starting(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(_: State) -> None:
        raise RuntimeError("no model")

    async with open_state(settings, [fail]) as state:
        await asyncio.sleep(0.01)
        assert not state["health"].started
    assert "warm-up failed, this process stays in `starting`" in caplog.messages
