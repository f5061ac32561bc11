"""The SQL of widgets.

The caller passes the connection and owns the transaction.
"""

from typing import Any
from uuid import UUID

from app.storage.postgres import Connection
from scripts.feature.widgets.schemas import NewWidget, Widget


async def create(connection: Connection, new: NewWidget) -> Widget:
    """Store a new widget and return it."""
    query = """
        insert into widgets (name) values ($1)
        returning widget_id, name, created_at
    """
    row: Any = await connection.fetchrow(query, new.name)
    return Widget(**row)


async def get(connection: Connection, widget_id: UUID) -> Widget | None:
    """Return the one with this ID, or None."""
    query = """
        select widget_id, name, created_at from widgets
        where widget_id = $1
    """
    row = await connection.fetchrow(query, widget_id)
    return Widget(**row) if row else None


async def list_newest(connection: Connection, limit: int) -> list[Widget]:
    """Return up to `limit`, the newest first."""
    query = """
        select widget_id, name, created_at from widgets
        order by created_at desc, widget_id desc
        limit $1
    """
    rows = await connection.fetch(query, limit)
    return [Widget(**row) for row in rows]
