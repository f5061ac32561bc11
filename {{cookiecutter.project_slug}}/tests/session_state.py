"""A guard against state that a session keeps: the next user of the connection would meet it.

app/storage/pool.py returns a connection as it is, as PgBouncer in transaction mode does.
"""

import contextlib
from collections.abc import Iterator

import asyncpg
import pytest

from app.storage.pool import Pool

#: What a transaction does not end: a row for each, with its kind and its name.
LEFT = """
select 'set ' || name from pg_settings
where source = 'session' and setting is distinct from reset_val
union all select 'listen ' || channel from pg_listening_channels() channel
union all select 'advisory lock' from pg_locks
where locktype = 'advisory' and pid = pg_backend_pid()
union all select 'cursor with hold ' || name from pg_cursors where is_holdable
union all select 'prepare ' || name from pg_prepared_statements where from_sql
union all select 'temporary table ' || relname from pg_class
where relnamespace = pg_my_temp_schema() and relkind = 'r'
"""
REMEDY = (
    "Sessions are shared by all requests. Use `set local`, `set_config(..., true)` and "
    "`pg_advisory_xact_lock` in a transaction, and a connection of your own for the rest."
)


async def session_state(pool: Pool) -> list[str]:
    """Return what the idle connections of a pool have kept; close those that have."""
    found: list[str] = []
    for place in list(pool.free):
        connection = place.connection
        if connection is None or not place.is_usable():
            continue
        # A server that a test has stopped, or that it has left hung.
        with contextlib.suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            left = [row[0] for row in await connection.fetch(LEFT, timeout=5)]
            if left:
                found += left
                connection.terminate()
    return found


@contextlib.contextmanager
def no_session_state() -> Iterator[None]:
    """Fail a block in which a connection keeps state, when its pool is closed."""
    found: list[str] = []
    close = Pool.close

    async def check_and_close(pool: Pool, seconds: float) -> None:
        try:
            found.extend(await session_state(pool))
        finally:
            await close(pool, seconds)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Pool, "close", check_and_close)
        yield
    if found:
        pytest.fail(f"a Postgres connection was released with: {', '.join(found)}. {REMEDY}")
