"""The service with a route that reads a payment from Postgres each time; its own takes it from the cache."""

from uuid import UUID

from app.main import app
from app.payments import repository
from app.payments.schemas import Payment
from app.storage.postgres import DatabaseDependency


@app.get("/stored/{payment_id}")
async def read(payment_id: UUID, database: DatabaseDependency) -> Payment | None:
    """Look a payment up."""
    found = await database.retry(lambda connection: repository.get(connection, payment_id))
    return found[0] if found else None
