"""Request and response bodies of the conversations routes, and the payload of their job."""

from datetime import datetime
from typing import Annotated
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

#: A line of a conversation. Postgres stores no NUL in a text.
Line = Annotated[str, Field(min_length=1, max_length=2000, pattern=r"^[^\x00]*$")]


class NewConversation(BaseModel):
    """The body of a request that creates one."""

    model_config = ConfigDict(extra="forbid")

    lines: Annotated[list[Line], Field(min_length=1, max_length=100)]


class NewLine(BaseModel):
    """The body of a request that adds a line."""

    model_config = ConfigDict(extra="forbid")

    text: Line


class Conversation(BaseModel):
    """A stored one. `score` is null until its job has succeeded."""

    conversation_id: UUID
    created_at: datetime
    ended_at: datetime | None
    score: int | None


#: The type of the job. Not in jobs.py: the API does not import what workers need.
ENDED = "conversation.ended"


class ConversationEnded(BaseModel):
    """The payload of the job. New fields must be optional: rows outlive a release."""

    conversation_id: UUID


class Score(BaseModel):
    """The result of the job: 0 is unhappy, 100 is happy."""

    score: int
