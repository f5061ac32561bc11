"""The routes of payments."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request, Response

from app.errors import NotFoundError
from app.patterns.idempotency import OPENAPI_PARAMETERS, IdempotencyKey
from app.patterns.pagination import PATTERN, Cursor
from app.patterns.rate_limit import caller
from app.payments.schemas import NewPayment, Page, Payment
from app.payments.service import Payments, PaymentsDependency
from app.web.problems import problem_responses

router = APIRouter(prefix="/payments", tags=["payments"])


async def _limited(request: Request, payments: PaymentsDependency) -> Payments:
    await payments.limit.check(caller(request))
    return payments


@router.post(
    "",
    status_code=201,
    response_model=Payment,
    responses=problem_responses(400, 409, 422, 429, 503),
    openapi_extra=OPENAPI_PARAMETERS,
)
async def create(
    payments: Annotated[Payments, Depends(_limited)],
    new: NewPayment,
    key: IdempotencyKey,
    request: Request,
) -> Response:
    """Take a payment, once for each `Idempotency-Key`; `Location` says where it is from now on."""
    # Whose key it is: never the client's address, since a retry may come from another network.
    return await payments.create(
        new, key, getattr(request.state, "principal", ""), request.scope["root_path"]
    )


@router.get("", responses=problem_responses(422, 503))
async def list_page(
    payments: PaymentsDependency,
    response: Response,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
    cursor: Annotated[
        str | None, Query(pattern=PATTERN, description="`next_cursor` of a page.")
    ] = None,
) -> Page:
    """List payments, the newest first; those that come meanwhile move none of the others to another page."""
    response.headers["Cache-Control"] = "no-store"
    return await payments.list_page(limit, Cursor.parse(cursor) if cursor else Cursor())


@router.get("/{payment_id}", response_model=Payment, responses=problem_responses(404, 422, 503))
async def get(payment_id: UUID, payments: PaymentsDependency) -> Response:
    """Look a payment up."""
    if payment := await payments.get(payment_id):
        return Response(
            payment, headers={"Cache-Control": "no-store"}, media_type="application/json"
        )
    raise NotFoundError("There is no such payment.")
