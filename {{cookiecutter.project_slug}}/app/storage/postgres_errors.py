"""Translate asyncpg's errors.

A lost connection, a timeout, a conflict with another transaction and a read-only server become a
503; bugs pass unchanged.
"""

import asyncio
import re
from typing import Any

import asyncpg
from asyncpg.pool import PoolConnectionProxy

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
#: All of these: errors that are due to the server, unless they are bugs.
SERVER_ERRORS = (*SHUTDOWN_ERRORS, *CONNECTION_ERRORS, *TIMEOUT_ERRORS, *READ_ONLY_ERRORS)
#: Errors of a command that conflicts with another transaction, or with a migration: a deadlock, a
#: serialization failure, a lock timeout, a statement prepared before a change of the schema.
#: PostgreSQL, "Serialization Failure Handling": repeat the whole transaction.
TRANSIENT_ERRORS = (
    asyncpg.TransactionRollbackError,
    asyncpg.LockNotAvailableError,
    asyncpg.InvalidCachedStatementError,
    asyncpg.OutdatedSchemaCacheError,
)
#: Errors of a statement that a migration has made invalid by changing or dropping a type: "column
#: is of type uuid but expression is of type text", "operator does not exist: uuid = text", "cache
#: lookup failed for type 16385". Bugs raise them too.
SCHEMA_ERRORS = (
    asyncpg.DatatypeMismatchError,
    asyncpg.UndefinedFunctionError,
    asyncpg.InternalServerError,
)
#: The beginnings of Postgres' internal errors after a type or table was dropped. Internal messages
#: are never translated.
_DROPPED = ("cache lookup failed for ", "could not open relation with OID ", "tuple concurrently ")
#: The context of an error in a parameter, in any language: "unnamed portal parameter $1".
_PARAMETER_CONTEXT = re.compile(r"\$\d+$")


class ConnectionLostError(UnavailableError):
    """The server cannot be reached, or was lost; the last command may have been executed."""


class TransientError(UnavailableError):
    """A conflict ended the command and rolled its transaction back; a repetition may succeed."""


class CommandTimeoutError(UnavailableError):
    """A command took longer than its time limit; a server that hangs may still execute it."""


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


def raise_translated(raised: BaseException, connection: PoolConnectionProxy) -> None:
    """Raise the translation of an error that a command on this connection has raised.

    Raises `ConnectionLostError` for a lost connection, `TransientError` for a conflict,
    `CommandTimeoutError` for a timeout, `UnavailableError` for a read-only server. Anything else is
    a bug, and has no translation.
    """
    if isinstance(raised, TRANSIENT_ERRORS):
        raise TransientError("The database transaction met a conflict.") from raised
    if not isinstance(raised, SERVER_ERRORS):
        return
    error = _cause(raised)
    if isinstance(error, asyncio.CancelledError):
        raise error from None
    if isinstance(error, TIMEOUT_ERRORS):
        raise CommandTimeoutError("The database timed out.") from error
    if isinstance(error, READ_ONLY_ERRORS):
        connection.terminate()  # the next connection may reach a new primary
        raise UnavailableError("The database is read-only.") from error
    if isinstance(error, CONNECTION_ERRORS) and not _is_lost(connection):
        return  # a bug, such as a wrong number of arguments; or an error of another service
    raise ConnectionLostError("The database connection was lost.") from error


def _cause(error: BaseException) -> BaseException:
    """Return the error behind asyncpg's InterfaceError for a transaction that cannot be left."""
    while isinstance(error, asyncpg.InterfaceError) and error.__context__ is not None:
        error = error.__context__
    return error


async def has_schema_changed(error: asyncpg.PostgresError, connection: PoolConnectionProxy) -> bool:
    """Return whether one of `SCHEMA_ERRORS` comes from a migration, not from a bug.

    The types of a statement's parameters are fixed when it is prepared: here the same statement is
    valid if it is prepared now. An error in a function that it calls is a bug of the function.
    """
    if isinstance(error, asyncpg.InternalServerError):
        return str(error).startswith(_DROPPED)
    context = error.context or ""
    if error.internal_query or (context and not _PARAMETER_CONTEXT.search(context)):
        return False
    try:
        await connection.prepare(getattr(error, "query", ""))
    except (asyncpg.PostgresError, *CONNECTION_ERRORS):
        return False
    return True


def _is_lost(connection: PoolConnectionProxy) -> bool:
    try:
        return connection.is_closed()
    except asyncpg.InterfaceError:  # the pool has already taken it back
        return True
