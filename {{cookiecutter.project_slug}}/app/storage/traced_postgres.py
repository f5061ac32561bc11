"""A Postgres connection with a span around each query, used while traces are on.

Not by asyncpg's `add_query_logger`, which is called when the task waits next: a query that is
followed by a computation would be drawn after it.
"""

import contextlib
import functools
import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from app.storage.postgres_errors import BoundedCancelConnection
from app.telemetry import tracing

#: Characters of a query in its span.
MAX_CHARACTERS = 2000
_NO_SPAN = contextlib.nullcontext()
_TABLE = re.compile(r"\b(?:from|into|update|table)\s+(?!select\b)([a-z_][\w.]*)", re.IGNORECASE)
#: Literals: of strings, with and without escapes, and of numbers, but not the number of `$1`.
_LITERALS = re.compile(
    r"""(?:\b[eEbBxX])?'(?:[^'\\]|''|\\.)*'|\$(\w*)\$.*?\$\1\$|(?<![$\w.])\d+(?:\.\d+)?\b""",
    re.DOTALL,
)


class TracedConnection(BoundedCancelConnection):
    """A connection whose queries are spans of the active one, with their text but no values."""

    # asyncpg's own, which its stubs lack
    _params: Any
    _addr: Any

    def _span(self, query: str) -> AbstractContextManager[None]:
        # The pool resets a connection after an error, which is no query of the request's.
        if not tracing.is_recording() or query == self.get_reset_query():
            return _NO_SPAN
        operation, table, text = summarize(query)
        attributes: dict[str, Any] = {
            "db.system.name": "postgresql",
            "db.namespace": self._params.database,
            "db.operation.name": operation,
            "db.query.text": text,
        }
        if table:
            attributes["db.collection.name"] = table
        if isinstance(self._addr, tuple):
            attributes["server.address"], attributes["server.port"] = self._addr
        return tracing.ClientSpan(f"{operation} {table}".rstrip(), attributes)

    async def execute(self, query: str, *args: Any, **options: Any) -> str:
        """Execute a query."""
        with self._span(query):
            return await super().execute(query, *args, **options)

    async def executemany(
        self, command: str, args: Iterable[Sequence[Any]], **options: Any
    ) -> None:
        """Execute a query for each of the arguments."""
        with self._span(command):
            await super().executemany(command, args, **options)

    async def fetch(self, query: str, *args: Any, **options: Any) -> Any:
        """Return all rows."""
        with self._span(query):
            return await super().fetch(query, *args, **options)

    async def fetchrow(self, query: str, *args: Any, **options: Any) -> Any:
        """Return the first row, or None."""
        with self._span(query):
            return await super().fetchrow(query, *args, **options)

    async def fetchval(self, query: str, *args: Any, **options: Any) -> Any:
        """Return a column of the first row, or None."""
        with self._span(query):
            return await super().fetchval(query, *args, **options)

    async def fetchmany(self, query: str, args: Any, **options: Any) -> Any:
        """Return the rows for each of the arguments."""
        with self._span(query):
            return await super().fetchmany(query, args, **options)


@functools.lru_cache(maxsize=1000)
def summarize(query: str) -> tuple[str, str, str]:
    """Return the operation of a query, its first table, and its text on one line.

    The text has `?` in place of literals (OpenTelemetry, "Sanitization of db.query.text").
    """
    text = " ".join(_LITERALS.sub("?", query).split()).rstrip(";")
    table = _TABLE.search(text)
    operation = text.partition(" ")[0].upper()
    return operation, table[1] if table else "", text[:MAX_CHARACTERS]
