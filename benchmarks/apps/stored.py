"""The service with a route that reads a payment from Postgres; its own reads the cache."""

from uuid import UUID

from app.main import app
from app.payments import repository
from app.payments.schemas import Payment
from app.storage.postgres import DatabaseDependency


@app.get("/stored/{payment_id}")
async def get(payment_id: UUID, database: DatabaseDependency) -> Payment | None:
    """Return one payment."""
    found = await database.retry(lambda connection: repository.get(connection, payment_id))
    if found is None:
        return None
    payment, _ = found
    return payment
