"""Stored widgets for tests."""

from app.storage.postgres import Database
from scripts.feature.widgets import service
from scripts.feature.widgets.schemas import NewWidget, Widget


async def store(database: Database, *, name: str = "one") -> Widget:
    """Store a new widget; each value has a default."""
    return await service.create(database, NewWidget(name=name))
