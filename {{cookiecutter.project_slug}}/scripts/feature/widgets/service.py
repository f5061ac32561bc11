"""The decisions about widgets.

`database.retry` repeats idempotent work if the connection is lost. `database.acquire` does not:
other work could be done twice.
"""

from uuid import UUID

from app.storage.postgres import Database
from scripts.feature.widgets import repository
from scripts.feature.widgets.errors import WidgetNotFoundError
from scripts.feature.widgets.schemas import NewWidget, Page, Widget


async def create(database: Database, new: NewWidget) -> Widget:
    """Store a new widget."""
    async with database.acquire() as connection:
        return await repository.create(connection, new)


async def get(database: Database, widget_id: UUID) -> Widget:
    """Return the one with this ID. Raises `WidgetNotFoundError`."""
    found = await database.retry(lambda connection: repository.get(connection, widget_id))
    if found is None:
        raise WidgetNotFoundError
    return found


async def list_newest(database: Database, limit: int) -> Page:
    """Return up to `limit`, the newest first."""
    items = await database.retry(lambda connection: repository.list_newest(connection, limit))
    return Page(items=items)
