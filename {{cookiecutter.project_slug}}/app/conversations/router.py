"""The routes of conversations."""

from uuid import UUID

from fastapi import APIRouter, Request, Response

from app.conversations import service
from app.conversations.errors import ConversationEndedError, ConversationNotFoundError
from app.conversations.schemas import Conversation, NewConversation, NewLine
from app.errors import InvalidRequestError
from app.jobs.router import ACCEPTED, Accepted, accepted
from app.storage.postgres import DatabaseDependency
from app.web.problems import problem_responses
from app.web.quick_route import QuickRoute

NO_STORE = {"Cache-Control": "no-store"}
router = APIRouter(prefix="/conversations", tags=["conversations"], route_class=QuickRoute)


@router.post("", status_code=201, responses=problem_responses(400, InvalidRequestError, 503))
async def create(
    new: NewConversation, database: DatabaseDependency, request: Request, response: Response
) -> Conversation:
    """Create a conversation with its first lines. `Location` is its URL."""
    created = await service.create(database, new)
    path = f"/conversations/{created.conversation_id}"
    response.headers.update({"Location": request.scope["root_path"] + path} | NO_STORE)
    return created


@router.get(
    "/{conversation_id}",
    responses=problem_responses(ConversationNotFoundError, InvalidRequestError, 503),
)
async def get(
    conversation_id: UUID, database: DatabaseDependency, response: Response
) -> Conversation:
    """Look a conversation up."""
    response.headers.update(NO_STORE)
    return await service.get(database, conversation_id)


@router.post(
    "/{conversation_id}/lines",
    status_code=204,
    responses=problem_responses(
        400, ConversationNotFoundError, ConversationEndedError, InvalidRequestError, 503
    ),
)
async def add_line(conversation_id: UUID, line: NewLine, database: DatabaseDependency) -> None:
    """Add a line, until the conversation has ended."""
    await service.add_line(database, conversation_id, line)


@router.post(
    "/{conversation_id}/end",
    status_code=202,
    response_model=Accepted,
    responses={
        **ACCEPTED,
        **problem_responses(ConversationNotFoundError, InvalidRequestError, 503),
    },
)
async def end(conversation_id: UUID, database: DatabaseDependency, request: Request) -> Response:
    """End a conversation. A job computes its score; `Location` is the URL of that job.

    A repeated request gets the same job.
    """
    job_id = await service.end(database, conversation_id)
    return await accepted(request, database, job_id)
