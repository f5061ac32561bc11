"""What asyncpg raises when Postgres goes away, freezes or takes too long, and what of it a client is told."""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import asyncpg

from app.errors import UnavailableError

#: Seconds for a server to acknowledge that a command is to end, or the connection is given up.
CANCEL_TIMEOUT_SECONDS = 0.5
#: What a server says that goes away, restarts, or starts.
SHUTDOWN_ERRORS = (
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.IdleSessionTimeoutError,
)
#: What a lost connection raises, and bugs too. InternalClientError is what asyncpg 0.32 raises when the server closed
#: an idle connection just before it was used.
CONNECTION_ERRORS = (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError)
#: What a server says that answers, but takes no changes: a standby, or one whose disk is full.
READ_ONLY_ERRORS = (asyncpg.ReadOnlySQLTransactionError, asyncpg.InsufficientResourcesError)
#: What a command raises that takes too long: for us, or for the server's own `statement_timeout`.
TIMEOUT_ERRORS = (TimeoutError, asyncpg.QueryCanceledError)


class ConnectionLostError(UnavailableError):
    """The server went away, or cannot be reached; what it was told last may have been done, or not."""


class BoundedCancelConnection(asyncpg.Connection):
    """Tells the server to cancel a command that takes too long, as asyncpg does, but does not wait long for it.

    A rollback would wait for as long as a command may take, and a frozen server would cost a transaction that twice.
    """

    def _cancel_current_command(self, sent: Any, acknowledged: Any) -> None:
        super()._cancel_current_command(sent, acknowledged)  # type: ignore[misc]
        asyncio.get_running_loop().call_later(CANCEL_TIMEOUT_SECONDS, self._give_up, acknowledged)

    def _give_up(self, acknowledged: asyncio.Future[None]) -> None:
        if not acknowledged.done():
            self.terminate()


@contextlib.contextmanager
def translate_errors(connection: asyncpg.pool.PoolConnectionProxy) -> Iterator[None]:
    """Raise `ConnectionLostError` for a lost connection, `UnavailableError` for a server that is slow or only reads."""
    try:
        yield
    except (*SHUTDOWN_ERRORS, *CONNECTION_ERRORS, *TIMEOUT_ERRORS, *READ_ONLY_ERRORS) as raised:
        error = _origin(raised)
        if isinstance(error, asyncio.CancelledError):
            raise error from None
        if isinstance(error, TIMEOUT_ERRORS):
            raise UnavailableError("The database took too long.") from error
        if isinstance(error, READ_ONLY_ERRORS):
            connection.terminate()  # the next connection may be one to a new primary
            raise UnavailableError("The database takes no changes.") from error
        if isinstance(error, CONNECTION_ERRORS) and not _is_lost(connection):
            raise  # a bug, such as a wrong number of arguments, or another service's failure
        raise ConnectionLostError("The database did not answer.") from error


def _origin(error: BaseException) -> BaseException:
    """Return what asyncpg hides behind the InterfaceError of a transaction that cannot be left any more."""
    while isinstance(error, asyncpg.InterfaceError) and error.__context__ is not None:
        error = error.__context__
    return error


def _is_lost(connection: asyncpg.pool.PoolConnectionProxy) -> bool:
    try:
        return connection.is_closed()
    except asyncpg.InterfaceError:  # the pool has already taken it back
        return True
