"""The baseline with a database: FastAPI and asyncpg, with the query of stored.py."""

import contextlib
import os
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg
from fastapi import FastAPI, Request
from pydantic import BaseModel

QUERY = """
select payment_id, amount, currency, reference, status, created_at
from payments where payment_id = $1
"""


class Payment(BaseModel):
    """The fields of the service's response."""

    payment_id: UUID
    amount: int
    currency: str
    reference: str
    status: str
    created_at: datetime


@contextlib.asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
    """Open the pool, and close it at shutdown."""
    size = int(os.environ["POOL_SIZE"])
    async with asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=0, max_size=size) as pool:
        yield {"pool": pool}


app = FastAPI(lifespan=lifespan)


@app.get("/stored/{payment_id}")
async def read(payment_id: UUID, request: Request) -> Payment:
    """Return a payment."""
    return Payment(**await request.state.pool.fetchrow(QUERY, payment_id))
