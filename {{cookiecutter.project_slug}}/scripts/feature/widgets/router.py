"""The routes of widgets."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response

from app.storage.postgres import DatabaseDependency
from app.web.problems import problem_responses
from scripts.feature.widgets import service
from scripts.feature.widgets.schemas import NewWidget, Page, Widget

router = APIRouter(prefix="/widgets", tags=["widgets"])


@router.post("", status_code=201, responses=problem_responses(422, 503))
async def create(
    new: NewWidget, database: DatabaseDependency, request: Request, response: Response
) -> Widget:
    """Create one. `Location` is its URL."""
    created = await service.create(database, new)
    path = f"/widgets/{created.widget_id}"
    response.headers["Location"] = request.scope["root_path"] + path
    return created


@router.get("", responses=problem_responses(422, 503))
async def list_newest(
    database: DatabaseDependency, limit: Annotated[int, Query(ge=1, le=100)] = 50
) -> Page:
    """List the newest first."""
    return await service.list_newest(database, limit)


@router.get("/{widget_id}", responses=problem_responses(404, 422, 503))
async def get(widget_id: UUID, database: DatabaseDependency) -> Widget:
    """Look one up."""
    return await service.get(database, widget_id)
