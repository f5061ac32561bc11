"""A pool of processes: bounded, warmed up, and replaced when one dies.

docs/tuning.md describes when to use one, and the lines that add it to the service.
"""

import asyncio
import contextlib
import logging
import pickle
import random
from collections import deque
from collections.abc import Callable
from typing import Any, Self, TypeVar

from app.errors import ServiceError, UnavailableError
from app.process_pool.child import WarmUp, read_result
from app.process_pool.process import PoolProcess, ProcessDiedError
from app.settings import Settings
from app.tasks import StateLog, describe
from app.telemetry.context import request_context

#: Pause before a process that could not start is started again.
RESTART_SECONDS = 1.0
#: Processes that started together are not replaced together.
JITTER = 0.1
Result = TypeVar("Result")
logger = logging.getLogger("app.process_pool")


class PoolFullError(UnavailableError):
    """Too many calls are waiting for a process: 503 with `Retry-After`."""

    code = "process_pool_full"


class CallTimeoutError(ServiceError):
    """The call took too long, and its process was killed: 504."""

    status = 504
    code = "computation_timed_out"


class CrashError(ServiceError):
    """The process of the call died, such as for lack of memory: 500. Only this call fails."""

    status = 500
    code = "computation_crashed"


class ProcessPool:
    """Runs functions in other processes, one call per process at a time.

    Enter it in the lifespan. It is open at once; the processes start in the background, and calls
    wait for them.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        processes: int = 1,
        max_waiting: int | None = 8,
        timeout_seconds: float | None = 20,
        calls_per_process: int = 1000,
        warm_up: WarmUp | None = None,
        warm_up_seconds: float = 60,
        is_background: bool = False,
    ) -> None:
        """Of `processes` per worker. `max_waiting` more calls wait; those beyond get a 503.

        A call may run for `timeout_seconds`, less than `REQUEST_TIMEOUT_SECONDS`. None is no limit:
        for callers that are bounded in number and time themselves, such as jobs. A process is
        replaced after `calls_per_process`, which limits the effect of a memory leak. `warm_up` is
        called in each process before its first call, such as to load a model. One that takes longer
        than `warm_up_seconds` is killed and started again; the startup probe allows a minute too.

        `is_background` gives the processes only the CPU time that no other process of their control
        group or session wants: they delay none, and wait while others use all CPUs.
        """
        self.settings = settings
        self.size = processes
        self.max_waiting = max_waiting
        self.timeout_seconds = timeout_seconds
        self.calls_per_process = calls_per_process
        self.warm_up = warm_up
        self.warm_up_seconds = warm_up_seconds
        self.is_background = is_background
        self.processes: set[PoolProcess] = set()
        #: The last one is used first: its memory is in the caches.
        self.idle: list[PoolProcess] = []
        self.waiting: deque[asyncio.Future[PoolProcess]] = deque()
        self.starting: set[asyncio.Task[None]] = set()
        self.ending: set[asyncio.Task[str]] = set()
        self.is_closed = False
        self.is_warm = asyncio.Event()
        self.state = StateLog(logger, "pool process cannot start", "pool process started again")

    async def __aenter__(self) -> Self:
        for _ in range(self.size):
            self._start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Kill the processes, and their calls."""
        self.is_closed = True
        self._reject_waiting("The service is shutting down.")
        for task in self.starting:
            task.cancel()
        ends = [process.end() for process in self.processes]
        await asyncio.gather(*self.starting, *self.ending, *ends, return_exceptions=True)

    async def wait_until_warm(self) -> None:
        """Wait until all processes have started: a `warm_up` of the application."""
        await self.is_warm.wait()

    async def run(
        self, function: Callable[..., Result], *arguments: Any, timeout_seconds: float | None = None
    ) -> Result:
        """Call a function of a module in another process. The call is killed if it is cancelled.

        Function, arguments and result are pickled. Raises what the function raises, or
        `PoolFullError`, `CallTimeoutError` and `CrashError`.
        """
        message = pickle.dumps((function, arguments, request_context.get()))
        process = await self._take()
        name = getattr(function, "__qualname__", repr(function))
        try:
            async with asyncio.timeout(timeout_seconds or self.timeout_seconds):
                content = await process.exchange(message)
        except TimeoutError:
            logger.warning("computation timed out", extra={"function": name})
            raise CallTimeoutError("The computation timed out.") from None
        except ProcessDiedError:
            if self.is_closed:
                raise UnavailableError("The service is shutting down.") from None
            extra = {"function": name, "process_pid": process.pid, "exit": await process.end()}
            logger.error("process died in a computation", extra=extra)
            raise CrashError("The computation failed.") from None
        finally:
            self._give_back(process)
        result: Result = read_result(content)
        return result

    async def _take(self) -> PoolProcess:
        """Return a process that is idle now, or the next one. Raises `UnavailableError`."""
        if self.is_closed or (self.state.is_failing and not self.processes):
            raise UnavailableError("The process pool is not available.")
        if self.idle:
            return self.idle.pop()
        if self.max_waiting is not None and len(self.waiting) >= self.max_waiting:
            raise PoolFullError("Too many computations are waiting.")
        process: asyncio.Future[PoolProcess] = asyncio.get_running_loop().create_future()
        self.waiting.append(process)
        try:
            return await process
        except asyncio.CancelledError:
            if process.done() and not process.cancelled() and not process.exception():
                self._give_back(process.result())
            raise
        finally:
            with contextlib.suppress(ValueError):
                self.waiting.remove(process)

    def _give_back(self, process: PoolProcess) -> None:
        """Lend a process to the next call, or replace it."""
        if self.is_closed:
            return
        if not process.is_usable or process.is_retired:
            self._discard(process)
            return
        process.calls_left -= 1
        if process.calls_left <= 0 and not process.has_successor:
            self._start(process)
        self._lend(process)

    def _lend(self, process: PoolProcess) -> None:
        while self.waiting:
            call = self.waiting.popleft()
            if not call.done():
                call.set_result(process)
                return
        self.idle.append(process)

    def _discard(self, process: PoolProcess) -> None:
        """Kill a process, and start another unless its successor is being started."""
        process.kill()
        self.processes.discard(process)
        if process in self.idle:
            self.idle.remove(process)
        if not process.has_successor:
            self._start()
        task = asyncio.create_task(process.end())
        self.ending.add(task)
        task.add_done_callback(self.ending.discard)

    def _start(self, predecessor: PoolProcess | None = None) -> None:
        """Start a process in the background; it replaces its predecessor once it is warm."""
        if predecessor:
            predecessor.has_successor = True
        task = asyncio.create_task(self._start_until_it_succeeds(predecessor))
        self.starting.add(task)
        task.add_done_callback(self.starting.discard)

    async def _start_until_it_succeeds(self, predecessor: PoolProcess | None) -> None:
        while True:
            try:
                process = await PoolProcess.start(
                    self.settings,
                    self.warm_up,
                    self.warm_up_seconds,
                    is_background=self.is_background,
                )
                break
            except Exception as error:  # noqa: BLE001 - a warm-up may raise anything
                self.state.failed(describe(error))
            if not self.processes:
                self._reject_waiting("The process pool is not available.")
            await asyncio.sleep(RESTART_SECONDS)
        self.state.succeeded()
        self._add(process)
        if predecessor:
            predecessor.is_retired = True
        if predecessor in self.idle:
            self._discard(predecessor)

    def _add(self, process: PoolProcess) -> None:
        """Lend a process that has started for the first time."""
        jitter = random.uniform(1 - JITTER, 1)  # noqa: S311 - spreads out the replacements
        process.calls_left = round(self.calls_per_process * jitter)
        process.forwarding.add_done_callback(lambda _: self._on_exit(process))
        self.processes.add(process)
        if len(self.processes) >= self.size:
            self.is_warm.set()
        self._lend(process)

    def _on_exit(self, process: PoolProcess) -> None:
        """Replace a process that has died between two calls."""
        if process in self.idle and not self.is_closed:
            logger.warning("idle process died", extra={"process_pid": process.pid})
            self._discard(process)

    def _reject_waiting(self, detail: str) -> None:
        while self.waiting:
            call = self.waiting.popleft()
            if not call.done():
                call.set_exception(UnavailableError(detail))
