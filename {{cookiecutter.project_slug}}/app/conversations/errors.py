"""The errors of conversations that clients see."""

from app.errors import ConflictError, NotFoundError


class ConversationNotFoundError(NotFoundError):
    """There is none with this ID: 404."""

    def __init__(self) -> None:
        super().__init__("There is no such conversation.")


class ConversationEndedError(ConflictError):
    """An ended one gets no more lines: 409."""

    code = "conversation_ended"

    def __init__(self) -> None:
        super().__init__("The conversation has ended.")
