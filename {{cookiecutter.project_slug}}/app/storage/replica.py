"""A read replica: a streaming standby for the reads of those routes that ask for it.

    async def list_page(replica: ReplicaDependency) -> Page:
        rows = await replica.retry(lambda connection: repository.list_page(connection))

The read goes to the primary, within the same request, while the replica is unavailable or too old,
or if it has not replayed the caller's last write. A background task compares both servers, so a
replica that hangs costs no request its time limit.

Its lag is measured as Postgres measures `replay_lag` (walsender.c, LagTrackerRead): positions of
the primary are noted with the time, and the replica is as old as the newest one that it has
replayed. So an idle primary does not make it old, as `pg_last_xact_replay_timestamp()` would have
it, and a standby that receives nothing does become old.
"""

import asyncio
import contextlib
import math
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol, TypeVar, cast

import asyncpg
from fastapi import Depends, Request, Response
from prometheus_client import CollectorRegistry, Counter, Gauge

from app.errors import UnavailableError
from app.settings import Settings
from app.storage.postgres import Connection, Database
from app.storage.postgres_errors import CommandTimeoutError, ConnectionLostError, TransientError
from app.tasks import background_task

#: The position of a write in its response, and in the requests of a caller that must see it.
HEADER = "Write-Position"
#: Its value if the position could not be read. Such a caller reads from the primary.
UNKNOWN = "unknown"
#: For `openapi_extra=` of a route that reads.
POSITION_PARAMETERS = {
    "parameters": [
        {
            "name": HEADER,
            "in": "header",
            "description": f"`{HEADER}` of the caller's last write, which the response includes.",
            "schema": {"type": "string"},
        }
    ]
}
#: Pause between two comparisons, and so the resolution of the lag.
CHECK_SECONDS = 0.5
#: Time limit for the position after a write, which must not delay its response.
POSITION_SECONDS = 0.5
#: Positions that are noted: over an hour of lag.
MAX_NOTED = 10_000

# Why a read goes to the primary
UNAVAILABLE = "unavailable"
LAG = "lag"
POSITION = "position"
BUSY = "busy"
CONFLICT = "conflict"
SCHEMA = "schema"
REASONS = (UNAVAILABLE, LAG, POSITION, BUSY, CONFLICT, SCHEMA)
#: The result of a read that the replica has served.
REPLICA = "replica"

#: `visible`: what a read on this server sees. `flushed`: what it can have sent to its standbys.
_STATE = """
    select pg_is_in_recovery() as is_standby, pg_postmaster_start_time() as started_at,
        (case when pg_is_in_recovery() then coalesce(pg_last_wal_replay_lsn(), '0/0')
              else pg_current_wal_insert_lsn() end - '0/0')::bigint as visible,
        (case when pg_is_in_recovery() then coalesce(pg_last_wal_replay_lsn(), '0/0')
              else pg_current_wal_flush_lsn() end - '0/0')::bigint as flushed
"""
_WRITTEN = "select pg_current_wal_insert_lsn()::text"
_LSN = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})")

Result = TypeVar("Result")
Work = Callable[[Connection], Awaitable[Result]]
Check = Callable[[], Awaitable[object]]


class Reads(Protocol):
    """Where the reads of one request go to."""

    async def retry(self, work: Work[Result]) -> Result:
        """Call `work` with a connection. It must only read, and may be called again."""


class State(NamedTuple):
    """The state of a server, as it reports it."""

    is_standby: bool
    started_at: Any
    visible: int
    flushed: int


class History:
    """Positions of the primary, and the age of a replica at a position."""

    def __init__(self) -> None:
        #: Times with the position at that time, from the newest one that is replayed on.
        self.noted: deque[tuple[float, int]] = deque(maxlen=MAX_NOTED)

    def note(self, position: int, now: float) -> None:
        """Note the position of the primary."""
        if self.noted and self.noted[-1][1] == position:
            self.noted.pop()
        self.noted.append((now, position))

    def lag(self, position: int) -> float:
        """Return how old a replica at this position was when the primary was last asked.

        Infinite if it is older than all that is known. A primary that is down gets no older: it
        commits nothing that the replica could lack.
        """
        while len(self.noted) > 1 and self.noted[1][1] <= position:
            self.noted.popleft()
        if not self.noted or self.noted[0][1] > position:
            return math.inf
        return self.noted[-1][0] - self.noted[0][0]


class Metrics:
    """The metrics of the replica, in a registry of its own like those of a worker."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        text = "Reads for the replica: served by it, or by the primary and why."
        reads = Counter("db_replica_reads", text, ["result"], registry=registry)
        self.reads = {result: reads.labels(result) for result in (REPLICA, *REASONS)}
        text = "How old the replica is, for the worker to which it is oldest."
        self.lag = Gauge(
            "db_replica_lag_seconds", text, registry=registry, multiprocess_mode="livemax"
        )


class NoReplica:
    """The reads of a process without a replica: the primary's."""

    database = None
    checks: ClassVar[dict[str, Check]] = {}

    def __init__(self, primary: Database) -> None:
        self.retry = primary.retry

    def for_request(self, _: Request) -> Reads:
        """Return this, which is the same for all requests."""
        return self

    async def add_write_position(self, response: Response) -> None:
        """Add nothing."""


class Replica:
    """The replica as one worker sees it: its connections, and whether reads may go to it."""

    def __init__(self, settings: Settings, primary: Database, connections: int) -> None:
        """`connections` lead to the replica; one of them is the check's."""
        own: dict[str, Any] = {"database_url": settings.database_replica_url}
        # The primary is the retry.
        own["database_retry_seconds"] = 0
        self.settings = settings.model_copy(update=own)
        self.database = Database(self.settings, connections, "api-replica")
        self.primary = primary
        self.metrics = Metrics()
        self.history = History()
        #: Why reads go to the primary, or None.
        self.reason: str | None = UNAVAILABLE
        self.lag = math.inf
        #: The start of the replica's server, which identifies it; None while there is none.
        self.started_at: Any = None
        self.checks: dict[str, Check] = {"replica": self.check}

    def for_request(self, request: Request) -> Reads:
        """Return the reads of a request, at its position or later."""
        return ReplicaReads(self, parse_position(request.headers.get(HEADER)))

    async def add_write_position(self, response: Response) -> None:
        """Add the header with a position that includes the write. It fails no write.

        One round trip, after the commit: until then the position is not known.
        """
        position = UNKNOWN
        with contextlib.suppress(TimeoutError, UnavailableError, asyncpg.PostgresError):
            async with asyncio.timeout(POSITION_SECONDS), self.primary.acquire() as connection:
                position = await connection.fetchval(_WRITTEN)
        response.headers[HEADER] = position

    async def check(self) -> None:
        """Raise `UnavailableError` while reads go to the primary."""
        if self.reason == LAG:
            limit = self.settings.database_replica_max_lag_seconds
            msg = f"It is {self.lag:.1f} s old, and may be {limit:g} s."
            raise UnavailableError(msg)
        if self.reason:
            raise UnavailableError("It does not respond, or is a second primary.")

    async def watch(self) -> None:
        """Compare the replica with the primary until cancelled."""
        while True:
            await self.compare()
            await asyncio.sleep(CHECK_SECONDS)

    async def compare(self) -> None:
        """Compare the replica with the primary, and decide where reads go to."""
        primary, replica = await asyncio.gather(self._ask(self.primary), self._ask(self.database))
        if primary is not None:
            self.history.note(primary.flushed, time.monotonic())
        self._follow(replica)
        if replica is None or _is_other_primary(replica, primary):
            self.reason = UNAVAILABLE
            self.lag = math.inf
        else:
            self.lag = self.history.lag(replica.visible)
            is_old = self.lag > self.settings.database_replica_max_lag_seconds
            self.reason = LAG if is_old else None
        self.metrics.lag.set(self.lag)
        if primary is not None and replica is not None and not replica.is_standby:
            # It was promoted. By the next comparison another host of the URL may be a standby.
            # Until the primary responds, reads depend on this one.
            self.database.close_probe()

    def _follow(self, replica: State | None) -> None:
        """Close the connections to another server than the one that was asked."""
        started_at = replica.started_at if replica else None
        if started_at != self.started_at:
            # Reads that wait for a server that is lost go to the primary now.
            self.database.pool.terminate()
            self.started_at = started_at

    def failed(self, error: Exception) -> str:
        """Return why a read that has failed goes to the primary. Raises the error of a bug."""
        if isinstance(error.__cause__, asyncpg.ReadOnlySQLTransactionError):
            raise error
        if isinstance(error, TransientError):
            return CONFLICT
        if isinstance(error, asyncpg.PostgresError):
            return SCHEMA
        if isinstance(error.__cause__, TimeoutError) and not isinstance(error, CommandTimeoutError):
            return BUSY
        if isinstance(error, (ConnectionLostError, CommandTimeoutError)):
            # For all requests, until the next comparison
            self.reason = UNAVAILABLE
        return UNAVAILABLE

    async def _ask(self, database: Database) -> State | None:
        try:
            async with asyncio.timeout(self.settings.readiness_timeout_seconds):
                return await database.ask(_state)
        except Exception:  # noqa: BLE001 - whatever it is, the server is not known
            return None


class ReplicaReads:
    """The reads of one request: they go to the replica, or to the primary."""

    __slots__ = ("position", "replica")

    def __init__(self, replica: Replica, position: float) -> None:
        self.replica = replica
        self.position = position

    async def retry(self, work: Work[Result]) -> Result:
        """Call `work` with a connection to the replica, or to the primary. It must only read.

        Raises the errors of the primary, as `Database.retry`.
        """
        replica = self.replica
        reason = replica.reason
        if reason is None:
            reason, result = await self._read(work)
        replica.metrics.reads[reason or REPLICA].inc()
        if reason is not None:
            return await replica.primary.retry(work)
        return cast("Result", result)

    async def _read(self, work: Work[Result]) -> tuple[str | None, Result | None]:
        """Return the result of the replica, or why there is none."""
        replica = self.replica

        async def read(connection: Connection) -> tuple[str | None, Result | None]:
            # Asked on this connection: another one may lead to another server.
            if self.position and (await _state(connection)).visible < self.position:
                return POSITION, None
            return None, await work(connection)

        try:
            return await replica.database.retry(read)
        # Also for lack of a table or column, whose migration it has not replayed.
        except (UnavailableError, asyncpg.SyntaxOrAccessError) as error:
            return replica.failed(error), None


#: The reads of a process.
Source = NoReplica | Replica


def parse_position(text: str | None) -> float:
    """Return a position as a number: 0 for none, infinite for one that is not known."""
    if text is None:
        return 0
    match = _LSN.fullmatch(text)
    if match is None:
        return math.inf
    return (int(match[1], 16) << 32) + int(match[2], 16)


async def add_write_position(request: Request, response: Response) -> None:
    """Let the caller read its own write. Call this after the commit.

    It adds the position of the write to the response, if there is a replica.
    """
    replica: Source = request.scope["state"]["replica"]
    await replica.add_write_position(response)


@contextlib.asynccontextmanager
async def open_replica(
    settings: Settings, primary: Database, connections: int
) -> AsyncIterator[Source]:
    """Yield the reads of a worker. Without `DATABASE_REPLICA_URL` they are the primary's."""
    if not settings.has_replica:
        yield NoReplica(primary)
        return
    replica = Replica(settings, primary, connections)
    async with replica.database, background_task(replica.watch()):
        yield replica


async def _state(connection: Any) -> State:
    return State(*await connection.fetchrow(_STATE))


def _is_other_primary(replica: State, primary: State | None) -> bool:
    """Return whether both accept writes, and so may differ: a failover has left two primaries."""
    if primary is None or replica.is_standby or primary.is_standby:
        return False
    return bool(replica.started_at != primary.started_at)


async def _replica(request: Request) -> Reads:
    # Not by `request.state`, which is an object more per request: 1 us.
    source: Source = request.scope["state"]["replica"]
    return source.for_request(request)


#: The type of a route's parameter: `async def route(replica: ReplicaDependency)`.
ReplicaDependency = Annotated[Reads, Depends(_replica)]
