"""The routes of payments."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request, Response

from app.auth.dependencies import require
from app.auth.principal import principal_of
from app.errors import (
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    TooManyRequestsError,
    UnauthorizedError,
)
from app.patterns.idempotency import (
    OPENAPI_PARAMETERS,
    IdempotencyKey,
    KeyInUseError,
    KeyInvalidError,
    KeyReusedError,
)
from app.patterns.pagination import PATTERN, Cursor
from app.patterns.rate_limit import caller
from app.payments.schemas import NewPayment, Page, Payment, Totals
from app.payments.service import Payments, PaymentsDependency
from app.storage.replica import POSITION_PARAMETERS, ReplicaDependency, add_write_position
from app.web.problems import problem_responses
from app.web.quick_route import QuickRoute

NO_STORE = {"Cache-Control": "no-store"}
READ = require("payments:read")
WRITE = require("payments:write")
router = APIRouter(
    prefix="/payments",
    tags=["payments"],
    route_class=QuickRoute,
    responses=problem_responses(UnauthorizedError, ForbiddenError),
)


async def _rate_limited(request: Request, payments: PaymentsDependency) -> Payments:
    await payments.limit.check(caller(request))
    return payments


@router.post(
    "",
    dependencies=[WRITE],
    status_code=201,
    response_model=Payment,
    responses=problem_responses(
        KeyInvalidError,
        KeyInUseError,
        KeyReusedError,
        InvalidRequestError,
        TooManyRequestsError,
        503,
    ),
    openapi_extra=OPENAPI_PARAMETERS,
)
async def create(
    payments: Annotated[Payments, Depends(_rate_limited)],
    new: NewPayment,
    key: IdempotencyKey,
    request: Request,
) -> Response:
    """Create a payment, once per `Idempotency-Key`. `Location` is its URL."""
    # The owner is never the client's address: a retry may come from another network.
    owner = principal_of(request).subject
    stored = await payments.create(new, key, owner, request.scope["root_path"])
    response = stored.render()
    await add_write_position(request, response)
    return response


@router.get(
    "",
    dependencies=[READ],
    response_model=Page,
    responses=problem_responses(InvalidRequestError, 503),
    openapi_extra=POSITION_PARAMETERS,
)
async def list_page(
    payments: PaymentsDependency,
    reads: ReplicaDependency,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
    cursor: Annotated[
        str | None, Query(pattern=PATTERN, description="`next_cursor` of a page.")
    ] = None,
) -> Response:
    """List payments, newest first. New payments move no other payment to another page."""
    after = Cursor.parse(cursor) if cursor else Cursor()
    page = await payments.list_page(reads, limit, after)
    return Response(page.model_dump_json(), headers=NO_STORE, media_type="application/json")


# Before the route of one payment, whose path matches this one as well.
@router.get("/totals", dependencies=[READ], response_model=Totals, responses=problem_responses(503))
async def totals(payments: PaymentsDependency) -> Response:
    """Count and sum the payments of the last 24 hours, as of at most 10 s ago."""
    content = await payments.totals()
    return Response(content, headers=NO_STORE, media_type="application/json")


@router.get(
    "/{payment_id}",
    dependencies=[READ],
    response_model=Payment,
    responses=problem_responses(NotFoundError, InvalidRequestError, 503),
)
async def get(payment_id: UUID, payments: PaymentsDependency) -> Response:
    """Look a payment up."""
    payment = await payments.get(payment_id)
    if payment is not None:
        content = payment.model_dump_json()
        return Response(content, headers=NO_STORE, media_type="application/json")
    raise NotFoundError("There is no such payment.")
