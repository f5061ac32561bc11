"""The baseline of a payment: FastAPI and asyncpg, with the one statement of the service.

Without its rate limit, outbox relay, stored headers and access log.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID, uuid4, uuid5

import asyncpg
from fastapi import FastAPI, Header, HTTPException, Request
from pydantic import BaseModel

STORE = """
with claimed as (
    insert into idempotency_keys (scope, key, fingerprint, status, headers, body)
    select $1, $2, $3, $4, $5, $6
    where pg_try_advisory_xact_lock(hashtextextended($1 || chr(31) || $2, 0))
    on conflict do nothing returning true
),
created as (
    insert into payments
    (payment_id, amount, currency, reference, status, created_at, request_id)
    select $7, $8, $9, $10, $11, $12, $13 from claimed
),
published as (
    insert into outbox (topic, event_id, type, payload, traceparent)
    select $14, $15, $16, $17, $18 from claimed
)
select true from claimed
"""
EVENT = "payment.created"
#: Tables of its own, since the service publishes what is in its outbox.
SCHEMA = """
create schema if not exists bare;
create table if not exists bare.payments (like public.payments including all);
create table if not exists bare.idempotency_keys (like public.idempotency_keys including all);
create table if not exists bare.outbox (like public.outbox including all);
"""


class NewPayment(BaseModel):
    """The fields of the service's request."""

    amount: int
    currency: str
    reference: str


class Payment(NewPayment):
    """The fields of the service's response."""

    payment_id: UUID
    status: str
    created_at: datetime


@contextlib.asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
    """Open the pool, and close it at shutdown."""
    size = int(os.environ["POOL_SIZE"])
    async with asyncpg.create_pool(
        os.environ["DATABASE_URL"],
        min_size=0,
        max_size=size,
        server_settings={"search_path": "bare"},
    ) as pool:
        await pool.execute(SCHEMA)
        yield {"pool": pool}


app = FastAPI(lifespan=lifespan)


@app.get("/payments")
async def list_page() -> list[Payment]:
    """Return nothing: the benchmark waits for a 200."""
    return []


@app.post("/payments", status_code=201)
async def create(
    new: NewPayment, request: Request, idempotency_key: Annotated[str, Header()]
) -> Payment:
    """Store a payment with its event, once per key."""
    payment = Payment(
        payment_id=uuid4(), status="pending", created_at=datetime.now(UTC), **new.model_dump()
    )
    body = payment.model_dump_json()
    fingerprint = hashlib.sha256(new.model_dump_json().encode()).digest()
    headers = json.dumps({"Location": f"/payments/{payment.payment_id}"})
    key = ("POST /payments", idempotency_key, fingerprint, 201, headers, body.encode())
    row = (payment.payment_id, new.amount, new.currency, new.reference)
    rest = (payment.status, payment.created_at, "")
    event = ("payment-events", uuid5(payment.payment_id, EVENT), EVENT, body, None)
    is_new = await request.state.pool.fetchval(STORE, *key, *row, *rest, *event)
    if not is_new:
        raise HTTPException(409)
    return payment
