"""The SQL of widgets.

The caller passes the connection and owns the transaction.
"""

from typing import Any
from uuid import UUID

from app.storage.postgres import Connection
from scripts.feature.widgets.schemas import NewWidget, Widget

_COLUMNS = "widget_id, name, created_at"
_CREATE = f"""
    insert into widgets (name) values ($1)
    returning {_COLUMNS}
"""  # noqa: S608
_GET = f"""
    select {_COLUMNS} from widgets
    where widget_id = $1
"""  # noqa: S608
_LIST_NEWEST = f"""
    select {_COLUMNS} from widgets
    order by created_at desc, widget_id desc
    limit $1
"""  # noqa: S608


async def create(connection: Connection, new: NewWidget) -> Widget:
    """Store a new widget and return it."""
    row: Any = await connection.fetchrow(_CREATE, new.name)
    return Widget(**row)


async def get(connection: Connection, widget_id: UUID) -> Widget | None:
    """Return the one with this ID, or None."""
    row = await connection.fetchrow(_GET, widget_id)
    return Widget(**row) if row else None


async def list_newest(connection: Connection, limit: int) -> list[Widget]:
    """Return up to `limit`, the newest first."""
    rows = await connection.fetch(_LIST_NEWEST, limit)
    return [Widget(**row) for row in rows]
