"""Translate asyncpg's errors.

A lost connection, a timeout and a read-only server become a 503; bugs pass unchanged.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import asyncpg

from app.errors import UnavailableError

#: Time limit for the server to acknowledge a cancellation; then the connection is terminated.
CANCEL_TIMEOUT_SECONDS = 0.5
#: Errors of a server that shuts down, restarts, or is still starting.
SHUTDOWN_ERRORS = (
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.IdleSessionTimeoutError,
)
#: Errors of a lost connection, which bugs raise too. asyncpg 0.32 raises InternalClientError when
#: the server closed an idle connection just before it was used.
CONNECTION_ERRORS = (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError)
#: Errors of a server that accepts no changes: a standby, or one whose disk is full.
READ_ONLY_ERRORS = (asyncpg.ReadOnlySQLTransactionError, asyncpg.InsufficientResourcesError)
#: Errors of a command that exceeds our timeout, or the server's own `statement_timeout`.
TIMEOUT_ERRORS = (TimeoutError, asyncpg.QueryCanceledError)


class ConnectionLostError(UnavailableError):
    """The server cannot be reached, or was lost; the last command may have been executed."""


class BoundedCancelConnection(asyncpg.Connection):
    """A connection that waits at most `CANCEL_TIMEOUT_SECONDS` for a cancellation.

    asyncpg waits as long as a command may take: a hung server would cost a transaction its command
    timeout twice, once for the command and once for the rollback.
    """

    def _cancel_current_command(self, sent: Any, acknowledged: Any) -> None:
        super()._cancel_current_command(sent, acknowledged)  # type: ignore[misc]
        loop = asyncio.get_running_loop()
        loop.call_later(CANCEL_TIMEOUT_SECONDS, self._terminate_unless, acknowledged)

    def _terminate_unless(self, acknowledged: asyncio.Future[None]) -> None:
        if not acknowledged.done():
            self.terminate()


@contextlib.contextmanager
def translate_errors(connection: asyncpg.pool.PoolConnectionProxy) -> Iterator[None]:
    """Translate the errors of commands on this connection.

    Raises `ConnectionLostError` for a lost connection, `UnavailableError` for a timeout or a
    read-only server. Anything else is a bug, and raised as it is.
    """
    try:
        yield
    except (*SHUTDOWN_ERRORS, *CONNECTION_ERRORS, *TIMEOUT_ERRORS, *READ_ONLY_ERRORS) as raised:
        error = _cause(raised)
        if isinstance(error, asyncio.CancelledError):
            raise error from None
        if isinstance(error, TIMEOUT_ERRORS):
            raise UnavailableError("The database timed out.") from error
        if isinstance(error, READ_ONLY_ERRORS):
            connection.terminate()  # the next connection may reach a new primary
            raise UnavailableError("The database is read-only.") from error
        if isinstance(error, CONNECTION_ERRORS) and not _is_lost(connection):
            raise  # a bug, such as a wrong number of arguments; or an error of another service
        raise ConnectionLostError("The database connection was lost.") from error


def _cause(error: BaseException) -> BaseException:
    """Return the error behind asyncpg's InterfaceError for a transaction that cannot be left."""
    while isinstance(error, asyncpg.InterfaceError) and error.__context__ is not None:
        error = error.__context__
    return error


def _is_lost(connection: asyncpg.pool.PoolConnectionProxy) -> bool:
    try:
        return connection.is_closed()
    except asyncpg.InterfaceError:  # the pool has already taken it back
        return True
