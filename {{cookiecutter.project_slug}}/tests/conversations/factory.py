"""Stored conversations for tests."""

from app.conversations import service
from app.conversations.schemas import Conversation, NewConversation
from app.storage.postgres import Database


async def store(database: Database, *lines: str) -> Conversation:
    """Store a new conversation; the line has a default."""
    new = NewConversation(lines=list(lines) or ["Thanks, that works."])
    return await service.create(database, new)
