"""The log of SQL statements, if `LOG_SQL` is set: their text and duration, never their values."""

import logging
from functools import partial

import asyncpg
from asyncpg.connection import LoggedQuery

#: Characters of a statement that are logged.
MAX_CHARACTERS = 2000
logger = logging.getLogger("app.sql")


def enable(connection: asyncpg.Connection) -> None:
    """Log the statements of a connection, except the one that resets it after an error."""
    connection.add_query_logger(partial(_log, connection.get_reset_query()))


def _log(reset: str, query: LoggedQuery) -> None:
    if query.query == reset:
        return
    fields: dict[str, object] = {"duration_ms": round(query.elapsed * 1000, 3)}
    if query.exception:
        fields["error"] = type(query.exception).__name__
    text = " ".join(query.query.split())
    logger.info("%s", text[:MAX_CHARACTERS], extra=fields)
