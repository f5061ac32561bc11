"""The service with a route that reads a payment, and returns the response of bare_postgres.py.

Below `/plain` it is FastAPI's own route.
"""

from uuid import UUID

from app.main import app
from app.payments import repository
from app.payments.schemas import Payment
from app.storage.postgres import DatabaseDependency
from app.web.quick_route import QuickRoute
from fastapi import APIRouter

router = APIRouter(route_class=QuickRoute)
plain = APIRouter(prefix="/plain")


@plain.get("/stored/{payment_id}")
@router.get("/stored/{payment_id}")
async def get(payment_id: UUID, database: DatabaseDependency) -> Payment | None:
    """Return one payment."""
    found = await database.retry(lambda connection: repository.get(connection, payment_id))
    if found is None:
        return None
    payment, _ = found
    return payment


app.include_router(router)
app.include_router(plain)
