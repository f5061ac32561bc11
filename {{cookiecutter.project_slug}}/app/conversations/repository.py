"""The SQL of conversations. The caller passes the connection and owns the transaction."""

from typing import Any
from uuid import UUID

from app.conversations.schemas import Conversation
from app.storage.postgres import Connection

_COLUMNS = "conversation_id, created_at, ended_at, score"
_CREATE = f"""
    with created as (insert into conversations default values returning {_COLUMNS}),
    added as (
        insert into conversation_lines (conversation_id, text)
        select conversation_id, text
        from created, unnest($1::text[]) with ordinality as given (text, number)
        order by number
    )
    select {_COLUMNS} from created
"""  # noqa: S608
_GET = f"select {_COLUMNS} from conversations where conversation_id = $1"  # noqa: S608
# The lock makes a line and the end of its conversation wait for each other.
_ADD_LINE = """
    with open as (
        select conversation_id from conversations
        where conversation_id = $1 and ended_at is null for share
    )
    insert into conversation_lines (conversation_id, text) select conversation_id, $2 from open
    returning true
"""
_LIST_LINES = "select text from conversation_lines where conversation_id = $1 order by number"
_END = """
    update conversations set ended_at = coalesce(ended_at, now()) where conversation_id = $1
    returning true
"""
_STORE_SCORE = """
    update conversations set score = $2, ended_at = coalesce(ended_at, now())
    where conversation_id = $1
"""


async def create(connection: Connection, lines: list[str]) -> Conversation:
    """Store a conversation with its first lines, and return it."""
    row: Any = await connection.fetchrow(_CREATE, lines)
    return Conversation(**row)


async def get(connection: Connection, conversation_id: UUID) -> Conversation | None:
    """Return the one with this ID, or None."""
    row = await connection.fetchrow(_GET, conversation_id)
    return None if row is None else Conversation(**row)


async def add_line(connection: Connection, conversation_id: UUID, text: str) -> bool:
    """Add a line, unless the conversation has ended or does not exist; return whether it did."""
    return await connection.fetchval(_ADD_LINE, conversation_id, text) is True


async def list_lines(connection: Connection, conversation_id: UUID) -> list[str]:
    """Return the lines in their order; none if there is no such conversation."""
    rows = await connection.fetch(_LIST_LINES, conversation_id)
    return [row["text"] for row in rows]


async def end(connection: Connection, conversation_id: UUID) -> bool:
    """Note the end, if it is the first one; return whether the conversation exists."""
    return await connection.fetchval(_END, conversation_id) is True


async def store_score(connection: Connection, conversation_id: UUID, score: int) -> None:
    """Store the score. Another service may have ended the conversation."""
    await connection.execute(_STORE_SCORE, conversation_id, score)
