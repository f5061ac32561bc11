"""Connections of one process to Postgres: bounded in number, in age, and in the wait for one.

A connection is returned without a round trip, so its session is shared by all requests. What
PgBouncer's transaction mode forbids is forbidden: `set`, `listen`, `prepare`, session-level
advisory locks, temporary tables, cursors `with hold`. `set local` and `pg_advisory_xact_lock` end
with their transaction. asyncpg's pool resets each connection instead, which costs a round trip per
request, and protects nothing behind PgBouncer.
"""

import asyncio
import contextlib
import random
import select
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from app.storage.postgres_errors import CONNECTION_ERRORS

#: Time limit for the reset of a connection whose work failed; then it is terminated.
RESET_SECONDS = 2.0
#: Limits of a connection: idle time and number of uses, as of asyncpg's pool; and age.
MAX_IDLE_SECONDS = 300.0
MAX_USES = 50_000
MAX_AGE_SECONDS = 1800.0
#: Connections that were opened together do not expire together: a part of their age is random.
AGE_SPREAD = 0.1
#: Pause between looks for connections that are idle for too long.
SWEEP_SECONDS = 30.0

#: A connection that is lent. Its methods raise `InterfaceError` after its release.
Connection = PoolConnectionProxy


class Place:
    """A place of a pool: a connection, or none yet."""

    def __init__(self, pool: "Pool") -> None:
        # asyncpg's name: a statement that is invalid after a migration clears the caches of all.
        self._pool = pool
        self.connection: asyncpg.Connection | None = None
        self.events = select.poll()
        self.uses = 0
        #: By `time.monotonic()`.
        self.idle_since = 0.0
        self.expires_at = 0.0

    def put(self, connection: asyncpg.Connection) -> None:
        """Put a new connection here."""
        internals: Any = connection
        self.events = select.poll()
        self.events.register(internals._transport.get_extra_info("socket"), select.POLLIN)
        self.connection = connection
        self.uses = 0
        age = MAX_AGE_SECONDS * (1 - AGE_SPREAD * random.random())  # noqa: S311 - spreads them out
        self.expires_at = time.monotonic() + age

    def is_connected(self) -> bool:
        """Return whether there is a connection, as far as this process has noticed."""
        return self.connection is not None and not self.connection.is_closed()

    def is_usable(self) -> bool:
        """Return whether there is a connection to lend.

        A server sends nothing to an idle connection, except that it shuts down, or closes it. The
        event loop may not have read that yet. One system call, 0.5 us.
        """
        return self.is_connected() and not self.events.poll(0)

    def is_clean(self) -> bool:
        """Return whether the connection is out of a transaction, and executes nothing."""
        connection: Any = self.connection
        return (
            self.is_connected()
            and not connection.is_in_transaction()
            and not connection._stmt_exclusive_section._acquired
            and not connection._protocol._is_cancelling()
        )

    def is_worn(self, now: float) -> bool:
        """Return whether the connection has reached its age or its number of uses."""
        return self.uses >= MAX_USES or now >= self.expires_at

    def lend(self) -> Connection:
        """Return the connection, for one use."""
        self.uses += 1
        holder: Any = self
        assert self.connection is not None  # noqa: S101 - for mypy
        return Connection(holder, self.connection)

    async def reset(self) -> None:
        """End the transaction, and forget the session's state."""
        connection: Any = self.connection
        # Else asyncpg logs an active transaction, whose cancelled commit is about to end it.
        await connection._protocol._wait_for_cancellation(None)
        await connection.reset()

    async def close(self) -> None:
        """Close the connection, if there is one. A lost one is no error."""
        if self.connection is not None:
            with contextlib.suppress(asyncpg.PostgresError, *CONNECTION_ERRORS):
                await self.connection.close()

    def terminate(self) -> None:
        """Close the connection, if there is one, without waiting."""
        if self.connection is not None:
            self.connection.terminate()
        self.connection = None


class Pool:
    """Lends connections, the one that was used last first. Nothing connects before first use."""

    def __init__(self, connect: Callable[[], Awaitable[asyncpg.Connection]], size: int) -> None:
        self.connect = connect
        self.places = [Place(self) for _ in range(size)]
        #: Places that are not lent: those without a connection first, the last used one last.
        self.free = deque(self.places)
        self.waiting: deque[asyncio.Future[Place | None]] = deque()
        self.resets: set[asyncio.Task[None]] = set()
        self.sweep: asyncio.TimerHandle | None = None
        self.closing = False

    def take_idle(self) -> Connection | None:
        """Lend an idle connection, if there is one that works."""
        while self.free and self.free[-1].connection is not None:
            place = self.free.pop()
            if place.is_usable():
                return place.lend()
            place.terminate()
            self.free.appendleft(place)
        return None

    async def acquire(self, seconds: float | None = None) -> Connection:
        """Lend a connection. Release it with `release`.

        Raises `TimeoutError` if there is none in time, `InterfaceError` once the pool closes, and
        the errors of a connect.
        """
        connection = self.take_idle()
        return await self.wait_for_connection(seconds) if connection is None else connection

    async def wait_for_connection(self, seconds: float | None = None) -> Connection:
        """Lend a connection, like `acquire`, where none is idle."""
        if self.closing:
            raise asyncpg.InterfaceError("the pool is closing")
        loop = asyncio.get_running_loop()
        deadline = None if seconds is None else loop.time() + seconds
        if self.free:
            place = self.free.pop()
            is_usable = place.is_usable()
        else:
            place = await self._wait_for_place(deadline)
            # It was in use until this turn of the event loop, not idle.
            is_usable = place.is_connected()
        if not is_usable:
            async with asyncio.timeout_at(deadline):
                await self._open(place)
        return place.lend()

    def release(self, lent: Connection, *, is_successful: bool = True) -> None:
        """Take a connection back, at once.

        It is reset in the background if its work failed, or has left a transaction or a command.
        """
        proxy: Any = lent
        place: Place = proxy._holder
        connection = proxy._detach()
        connection._on_release()
        if is_successful and place.is_clean():
            place.idle_since = time.monotonic()
            if place.is_worn(place.idle_since):
                place.terminate()
            self._put(place)
        else:
            self._start_reset(place)

    async def close(self, seconds: float) -> None:
        """Close the connections. Those that are lent for longer than that are terminated."""
        if self.closing:
            return
        self.closing = True
        if self.sweep is not None:
            self.sweep.cancel()
        try:
            async with asyncio.timeout(seconds):
                for _ in self.places:
                    place = self.free.pop() if self.free else await self._wait_for_place()
                    await place.close()
        except TimeoutError:
            pass
        finally:
            self.terminate()
        if self.resets:
            await asyncio.wait(self.resets, timeout=seconds)

    def terminate(self) -> None:
        """Terminate all connections, also those that are lent."""
        for place in self.places:
            place.terminate()

    def is_closing(self) -> bool:
        """Return whether the pool lends no more connections."""
        return self.closing

    def get_size(self) -> int:
        """Return the number of connections."""
        return sum(place.is_connected() for place in self.places)

    def get_idle_size(self) -> int:
        """Return the number of connections that are not lent."""
        return sum(place.is_connected() for place in self.free)

    def get_max_size(self) -> int:
        """Return the greatest number of connections."""
        return len(self.places)

    async def execute(self, query: str, *arguments: object) -> str:
        """Execute a query on one of the connections."""
        status: str = await self._use("execute", query, arguments)
        return status

    async def fetch(self, query: str, *arguments: object) -> Any:
        """Return the rows of a query on one of the connections."""
        return await self._use("fetch", query, arguments)

    async def fetchrow(self, query: str, *arguments: object) -> Any:
        """Return the first row, or None."""
        return await self._use("fetchrow", query, arguments)

    async def fetchval(self, query: str, *arguments: object) -> Any:
        """Return the first column of the first row, or None."""
        return await self._use("fetchval", query, arguments)

    async def _use(self, method: str, query: str, arguments: tuple[object, ...]) -> Any:
        connection = await self.acquire()
        is_successful = False
        try:
            result = await getattr(connection, method)(query, *arguments)
            is_successful = True
            return result
        finally:
            self.release(connection, is_successful=is_successful)

    async def _wait_for_place(self, deadline: float | None = None) -> Place:
        """Return the next place that is released; callers get one in their order.

        Raises `TimeoutError` at the deadline. Most requests of a busy worker wait here, so it has
        a timer of its own: `asyncio.timeout` costs 2 us more.
        """
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Place | None] = loop.create_future()
        self.waiting.append(waiter)
        timer = None if deadline is None else loop.call_at(deadline, self._give_up, waiter)
        try:
            place = await waiter
        except asyncio.CancelledError:
            self._stop_waiting(waiter)
            raise
        finally:
            if timer is not None:
                timer.cancel()
        if place is None:
            raise TimeoutError
        return place

    def _give_up(self, waiter: "asyncio.Future[Place | None]") -> None:
        """End a wait without a place, unless it has one."""
        if not waiter.done():
            self.waiting.remove(waiter)
            waiter.set_result(None)

    def _stop_waiting(self, waiter: "asyncio.Future[Place | None]") -> None:
        """End a wait that is cancelled."""
        if waiter.cancelled():
            with contextlib.suppress(ValueError):
                self.waiting.remove(waiter)
        elif (place := waiter.result()) is not None:  # it came in the same moment
            self._put(place)

    def _put(self, place: Place) -> None:
        """Give a place to the next caller that waits."""
        while self.waiting:
            waiter = self.waiting.popleft()
            if not waiter.done():
                waiter.set_result(place)
                return
        if place.connection is None:
            self.free.appendleft(place)
        else:
            self.free.append(place)

    async def _open(self, place: Place) -> None:
        """Connect, in place of a connection that is lost."""
        place.terminate()
        try:
            place.put(await self.connect())
            if self.closing:
                place.terminate()
                raise asyncpg.InterfaceError("the pool is closing")
        except BaseException:
            self._put(place)
            raise
        if self.sweep is None:
            self._sweep_later()

    def _start_reset(self, place: Place) -> None:
        task = asyncio.get_running_loop().create_task(self._reset(place))
        self.resets.add(task)
        task.add_done_callback(self.resets.discard)

    async def _reset(self, place: Place) -> None:
        """Reset a connection for its next use, or give it up."""
        is_reset = False
        try:
            if place.is_connected():
                async with asyncio.timeout(RESET_SECONDS):
                    await place.reset()
                is_reset = True
        except (TimeoutError, asyncpg.PostgresError, *CONNECTION_ERRORS):
            pass
        finally:
            if not is_reset:
                place.terminate()
            place.idle_since = time.monotonic()
            self._put(place)

    def _sweep_later(self) -> None:
        self.sweep = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep)

    def _sweep(self) -> None:
        """Close connections that are idle for too long, or too old."""
        now = time.monotonic()
        for place in self.free:
            if now - place.idle_since >= MAX_IDLE_SECONDS or place.is_worn(now):
                place.terminate()
        self.free = deque(sorted(self.free, key=Place.is_connected))
        self.sweep = None
        if self.get_size() and not self.closing:
            self._sweep_later()

    # asyncpg calls these when a statement or a type is outdated: all connections prepare again.

    def _drop_statement_cache(self) -> None:
        for place in self.places:
            connection: Any = place.connection
            if connection is not None:
                connection._drop_local_statement_cache()

    def _drop_type_cache(self) -> None:
        for place in self.places:
            connection: Any = place.connection
            if connection is not None:
                connection._drop_local_type_cache()
