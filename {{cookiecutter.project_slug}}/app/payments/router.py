"""The routes of payments."""

from uuid import UUID

from fastapi import APIRouter, Depends, Request, Response

from app.database import DatabaseDependency
from app.errors import NotFoundError, responses
from app.payments import repository
from app.payments.schemas import NewPayment, Payment


async def _never_stored(response: Response) -> None:
    response.headers["Cache-Control"] = "no-store"


router = APIRouter(prefix="/payments", tags=["payments"], dependencies=[Depends(_never_stored)])


@router.post("", status_code=201, responses=responses(422, 503))
async def create(new: NewPayment, database: DatabaseDependency, request: Request, response: Response) -> Payment:
    """Take a payment; `Location` says where it is from now on."""
    async with database.acquire() as connection:
        payment = await repository.insert(connection, new)
    response.headers["Location"] = f"{request.scope['root_path']}/payments/{payment.payment_id}"
    return payment


@router.get("/{payment_id}", responses=responses(404, 422, 503))
async def read(payment_id: UUID, database: DatabaseDependency) -> Payment:
    """Look a payment up."""
    payment = await database.retry(lambda connection: repository.find(connection, payment_id))
    if payment is None:
        msg = "There is no such payment."
        raise NotFoundError(msg)
    return payment
