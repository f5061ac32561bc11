"""The decisions about conversations.

`database.retry` repeats idempotent work if the connection is lost. `database.acquire` does not:
other work could be done twice.
"""

from uuid import UUID

from app.conversations import repository
from app.conversations.errors import ConversationEndedError, ConversationNotFoundError
from app.conversations.schemas import (
    ENDED,
    Conversation,
    ConversationEnded,
    NewConversation,
    NewLine,
)
from app.jobs import table
from app.storage.postgres import Connection, Database


async def create(database: Database, new: NewConversation) -> Conversation:
    """Store a new conversation."""
    async with database.acquire() as connection:
        return await repository.create(connection, new.lines)


async def get(database: Database, conversation_id: UUID) -> Conversation:
    """Return the one with this ID. Raises `ConversationNotFoundError`."""
    found = await database.retry(lambda connection: repository.get(connection, conversation_id))
    if found is None:
        raise ConversationNotFoundError
    return found


async def add_line(database: Database, conversation_id: UUID, line: NewLine) -> None:
    """Add a line. Raises `ConversationNotFoundError` or `ConversationEndedError`."""
    async with database.acquire() as connection:
        if await repository.add_line(connection, conversation_id, line.text):
            return
        if await repository.get(connection, conversation_id) is None:
            raise ConversationNotFoundError
    raise ConversationEndedError


async def end(database: Database, conversation_id: UUID) -> UUID:
    """End a conversation and enqueue its score, in one transaction; return the ID of the job.

    The key makes a repeated end the same job. Raises `ConversationNotFoundError`.
    """

    async def end_once(connection: Connection) -> UUID:
        async with connection.transaction():
            if not await repository.end(connection, conversation_id):
                raise ConversationNotFoundError
            ended = ConversationEnded(conversation_id=conversation_id)
            return await table.enqueue(connection, ENDED, ended, key=str(conversation_id))

    return await database.retry(end_once)
