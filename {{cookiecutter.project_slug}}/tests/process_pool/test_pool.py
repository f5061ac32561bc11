"""The process pool: bounds, crashes, timeouts, replacements."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.errors import ConflictError, UnavailableError
from app.process_pool import pool as module
from app.process_pool import process
from app.process_pool.pool import CallTimeoutError, CrashError, PoolFullError, ProcessPool
from app.process_pool.process import PoolProcess
from app.settings import Settings
from tests.patience import patience
from tests.process_pool import work
from tests.service_process import eventually

SETTINGS = Settings(log_format="json")


async def eventually_ended(pid: int) -> None:
    """Wait until a process has ended, and has been waited for."""
    await asyncio.to_thread(eventually, lambda: not psutil.pid_exists(pid))


@contextlib.asynccontextmanager
async def opened(**options: Any) -> AsyncIterator[ProcessPool]:
    async with ProcessPool(SETTINGS, **options) as pool:
        await pool.wait_until_warm()
        yield pool
    if options.get("is_background"):
        # Even a killed one ends only when it gets CPU time.
        for each in pool.processes:
            await asyncio.to_thread(each.popen.wait, 60)
    assert not [each for each in pool.processes if psutil.pid_exists(each.pid)]


async def test_function_runs_in_another_process() -> None:
    """Results and arguments of any size; a further call is run by the process that is warm."""
    async with opened() as pool:
        first = await pool.run(work.pid)
        assert first != os.getpid()
        assert await pool.run(work.pid) == first
        content = b"x" * 5_000_000
        assert await pool.run(work.large, content) == content


async def test_exception_is_raised_with_its_traceback() -> None:
    async with opened() as pool:
        with pytest.raises(LookupError, match="the bug") as bug:
            await pool.run(work.bug)
        assert "work.py" in bug.value.__notes__[0]
        with pytest.raises(ConflictError) as conflict:
            await pool.run(work.conflict)
        assert (conflict.value.status, conflict.value.detail) == (409, "It is shipped.")
        with pytest.raises(RuntimeError, match="OddError: odd number 3"):
            await pool.run(work.odd)
        with pytest.raises(RuntimeError, match="SystemExit: 3"):
            await pool.run(work.leave)
        with pytest.raises(Exception, match="pickle"):
            await pool.run(work.return_unpicklable)
        assert await pool.run(work.pid) == pool.idle[0].pid


async def test_further_calls_wait_up_to_the_limit() -> None:
    """A full pool rejects at once, and a call that is cancelled leaves its place."""
    async with opened(max_waiting=2) as pool:
        calls = [asyncio.create_task(pool.run(work.sleep, 0.2)) for _ in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(PoolFullError) as full:
            await pool.run(work.pid)
        assert (full.value.headers or {})["Retry-After"] == "1"
        calls.pop().cancel()
        await asyncio.sleep(0)
        calls.append(asyncio.create_task(pool.run(work.pid)))
        assert len(set(await asyncio.gather(*calls))) == 1


async def test_pool_without_limits_rejects_and_interrupts_no_call() -> None:
    """For callers that are bounded in number and time themselves."""
    async with opened(max_waiting=None, timeout_seconds=None) as pool:
        calls = [pool.run(work.pid) for _ in range(50)]
        assert len(set(await asyncio.gather(*calls))) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has the policy")
@pytest.mark.parametrize("is_background", [False, True])
async def test_background_uses_only_the_cpu_time_that_is_left(*, is_background: bool) -> None:
    async with opened(is_background=is_background) as pool:
        policy = os.sched_getscheduler(await pool.run(work.pid))
        assert policy == (os.SCHED_IDLE if is_background else os.SCHED_OTHER)


async def test_killed_process_fails_its_own_call_only(caplog: pytest.LogCaptureFixture) -> None:
    """As by the kernel, for lack of memory. The standard library's pool breaks as a whole."""
    async with opened(processes=2) as pool:
        calls = [asyncio.create_task(pool.run(work.sleep, 0.5)) for _ in range(4)]
        await asyncio.sleep(0.1)
        victim = next(iter(pool.processes - set(pool.idle)))
        os.kill(victim.pid, signal.SIGKILL)
        results = await asyncio.gather(*calls, return_exceptions=True)
        (error,) = [each for each in results if not isinstance(each, int)]
        assert isinstance(error, CrashError)
        assert await pool.run(work.pid) != victim.pid
    (record,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert record.message == "process died in a computation"
    assert vars(record)["exit"] == "killed by SIGKILL"
    assert vars(record)["function"] == "sleep"


async def test_killed_idle_process_is_replaced() -> None:
    async with opened() as pool:
        victim = pool.idle[0].pid
        os.kill(victim, signal.SIGKILL)
        await eventually_ended(victim)
        async with patience(20):
            assert await pool.run(work.pid) != victim


async def test_call_over_its_time_limit_is_killed() -> None:
    async with opened() as pool:
        victim = pool.idle[0].pid
        with pytest.raises(CallTimeoutError):
            await pool.run(work.sleep, 60, timeout_seconds=0.1)
        await eventually_ended(victim)
        assert await pool.run(work.pid) != victim


async def test_cancelled_call_is_killed() -> None:
    """So a request that has timed out, or whose client has left, occupies no CPU."""
    async with opened() as pool:
        victim = pool.idle[0].pid
        call = asyncio.create_task(pool.run(work.sleep, 60))
        await asyncio.sleep(0.05)
        call.cancel()
        await eventually_ended(victim)
        assert await pool.run(work.pid) != victim


async def test_process_is_replaced_after_its_calls() -> None:
    """The standard library's pool hangs with this limit: python/cpython issue 115634."""
    async with opened(max_waiting=100, calls_per_process=10) as pool:
        first = pool.idle[0].pid
        async with patience(60):
            while first in await asyncio.gather(*[pool.run(work.pid) for _ in range(20)]):
                pass  # calls do not wait for the successor
            await eventually_ended(first)
        assert len(pool.processes) == 1


async def test_calls_fail_while_no_process_can_start(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One line, no call that waits in vain, and the pool recovers by itself."""
    monkeypatch.setattr(module, "RESTART_SECONDS", 0.05)
    monkeypatch.setenv("WARM_UP_FILE", str(tmp_path / "model"))
    async with ProcessPool(SETTINGS, warm_up=work.warm_up_if_file_exists) as pool:
        with pytest.raises(UnavailableError):
            await pool.run(work.pid)
        with pytest.raises(UnavailableError):
            await pool.run(work.pid)
        (tmp_path / "model").touch()
        await pool.wait_until_warm()
        assert await pool.run(work.pid)
    messages = [each.message for each in caplog.records if each.name == "app.process_pool"]
    assert messages[0].startswith("pool process cannot start: FileNotFoundError")
    assert messages[1:] == ["pool process started again"]


async def test_hanging_warm_up_is_killed_and_repeated(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its place in the pool would stay empty. One line, and calls fail meanwhile."""
    monkeypatch.setenv("WARM_UP_FILE", str(tmp_path / "pid"))
    warm_up = work.warm_up_that_hangs_once
    async with ProcessPool(SETTINGS, warm_up=warm_up, warm_up_seconds=2) as pool:
        with pytest.raises(UnavailableError):
            await pool.run(work.pid)
        async with patience(60):
            await pool.wait_until_warm()
        assert await pool.run(work.pid)
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
    assert [each.message for each in caplog.records if each.name == "app.process_pool"] == [
        "pool process cannot start: WarmUpTimeoutError: not warm after 2 s",
        "pool process started again",
    ]


async def test_failed_start_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """For lack of processes, or cancelled at any moment."""

    def fail(*_: int) -> None:
        raise BlockingIOError("no more processes")

    this = psutil.Process()
    gc.collect()  # the sockets of other tests
    before = this.num_fds()
    children = this.children()
    with monkeypatch.context() as patch:
        patch.setattr(process, "_spawn", fail)
        with pytest.raises(BlockingIOError):
            await PoolProcess.start(SETTINGS, None, 60, is_background=False)
    await asyncio.to_thread(eventually, lambda: this.num_fds() == before)
    for number in range(8):
        start = asyncio.create_task(PoolProcess.start(SETTINGS, None, 60, is_background=False))
        for _ in range(number):
            await asyncio.sleep(0)
        start.cancel()
        await asyncio.wait([start])
        assert start.cancelled()
    await asyncio.to_thread(eventually, lambda: this.num_fds() == before)
    assert this.children() == children


async def test_closing_ends_the_calls() -> None:
    """Those that run and those that wait, at once."""
    async with ProcessPool(SETTINGS) as pool:
        await pool.wait_until_warm()
        calls = [asyncio.create_task(pool.run(work.sleep, 60)) for _ in range(2)]
        await asyncio.sleep(0.05)
        start = time.monotonic()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(each) for each in results] == [UnavailableError, UnavailableError]
    assert time.monotonic() - start < 10
    with pytest.raises(UnavailableError):
        await pool.run(work.pid)
