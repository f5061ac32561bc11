"""The routes of jobs: a client that got 202 looks here for the outcome (RFC 9110, section 15.3.3).

The ID of a job is a random UUID. Without authentication, every caller that knows it may read and
cancel the job.
"""

import json
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from app.errors import ConflictError, InvalidRequestError, NotFoundError
from app.jobs import table
from app.storage.postgres import Database, DatabaseDependency
from app.web.problems import problem_responses
from app.web.quick_route import QuickRoute

NO_STORE = {"Cache-Control": "no-store"}
#: Seconds until a client should look again.
RETRY_AFTER = {"Retry-After": "1"}
Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
router = APIRouter(prefix="/jobs", tags=["jobs"], route_class=QuickRoute)


class JobStatus(BaseModel):
    """A job as clients see it. `result` is the one of its type; why a job failed is in the log."""

    job_id: UUID
    type: str
    status: Status
    created_at: datetime
    started_at: Annotated[datetime | None, Field(description="The start of the last attempt.")]
    finished_at: Annotated[datetime | None, Field(description="Null until the job has ended.")]
    result: Annotated[Any, Field(description="Null unless it has succeeded.")]


class Accepted(BaseModel):
    """The body of a 202: the job, and the path of its status."""

    job_id: UUID
    status: Status
    monitor: str


class JobNotFoundError(NotFoundError):
    """There is none with this ID, or it was deleted some time after its end: 404."""

    def __init__(self) -> None:
        super().__init__("There is no such job.")


class JobEndedError(ConflictError):
    """It has ended, and cannot be cancelled: 409."""

    code = "job_ended"

    def __init__(self) -> None:
        super().__init__("The job has ended.")


def _describe(**headers: str) -> dict[str, Any]:
    """Return the OpenAPI description of headers."""
    return {
        name.replace("_", "-"): {"description": text, "schema": {"type": "string"}}
        for name, text in headers.items()
    }


_RETRY_AFTER_TEXT = "Seconds after which to look again; absent once the job has ended."
#: For `responses=` of a route that responds with `accepted`.
ACCEPTED: dict[int | str, dict[str, Any]] = {
    202: {"headers": _describe(Location="The URL of the job.", Retry_After=_RETRY_AFTER_TEXT)}
}


async def accepted(request: Request, database: Database, job_id: UUID) -> Response:
    """Return a 202 with the URL of a job, which is an older one if the request is a repeat.

    A response to `POST` may describe the status of the request (RFC 9110, section 15.3.3).
    """
    job = await _find(database, job_id)
    path = f"{request.scope['root_path']}/jobs/{job_id}"
    body = Accepted(job_id=job_id, status=job.status, monitor=path)
    headers = {"Location": path, **_headers(job)}
    return Response(body.model_dump_json(), 202, headers, media_type="application/json")


@router.get(
    "/{job_id}",
    responses={
        200: {"headers": _describe(Retry_After=_RETRY_AFTER_TEXT)},
        **problem_responses(JobNotFoundError, InvalidRequestError, 503),
    },
)
async def get(job_id: UUID, database: DatabaseDependency, response: Response) -> JobStatus:
    """Look a job up. `Retry-After` is present until it has ended."""
    job = await _find(database, job_id)
    response.headers.update(_headers(job))
    return job


@router.delete(
    "/{job_id}",
    status_code=204,
    responses=problem_responses(JobNotFoundError, JobEndedError, InvalidRequestError, 503),
)
async def cancel(job_id: UUID, database: DatabaseDependency) -> None:
    """Cancel a job that has not ended. It has no effect then, even if it is running."""
    if await database.retry(lambda connection: table.cancel(connection, job_id)):
        return
    job = await _find(database, job_id)
    # A repeated request is not an error: DELETE is idempotent (RFC 9110, section 9.2.2).
    if job.status != "cancelled":
        raise JobEndedError


async def _find(database: Database, job_id: UUID) -> JobStatus:
    """Return a job. Raises `JobNotFoundError`."""
    row = await database.retry(lambda connection: table.find(connection, job_id))
    if row is None:
        raise JobNotFoundError
    result = json.loads(row["result"]) if row["result"] else None
    return JobStatus(**{**row, "result": result})


def _headers(job: JobStatus) -> dict[str, str]:
    return NO_STORE if job.finished_at else NO_STORE | RETRY_AFTER
