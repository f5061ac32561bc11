"""Rows for development: add yours to `ROWS`, then run `make seed`, as often as you like."""

import asyncio
import sys
from typing import Any

import asyncpg

from app.network.connection_urls import postgres_addresses
from app.settings import load_settings

#: Hosts on this machine, as is each unix socket, whose host is a path.
LOCAL_HOSTS = {"127.0.0.1", "::1", "localhost"}
# example: begin
CREATE_PAYMENT = """
    insert into payments (payment_id, amount, currency, reference, status, request_id)
    values ($1, $2, $3, $4, 'settled', 'seed') on conflict do nothing
"""
PAYMENTS = [
    ("00000000-0000-4000-8000-000000000001", 1250, "EUR", "seed-1"),
    ("00000000-0000-4000-8000-000000000002", 99, "USD", "seed-2"),
    ("00000000-0000-4000-8000-000000000003", 480_000, "JPY", "seed-3"),
]

# example: end
#: Each statement with its rows. `on conflict do nothing` lets it run again.
ROWS: list[tuple[str, list[tuple[Any, ...]]]] = [
    # ("insert into orders (name) values ($1) on conflict do nothing", [("first",), ("second",)]),
    (CREATE_PAYMENT, PAYMENTS)  # example
]


async def seed(connection: asyncpg.Connection) -> int:
    """Insert the rows, in one transaction; return how many there are."""
    async with connection.transaction():
        for statement, rows in ROWS:
            await connection.executemany(statement, rows)
    return sum(len(rows) for _, rows in ROWS)


async def main() -> None:
    """Seed the database of `DATABASE_URL`. Raises `SystemExit` if it is on another machine."""
    url = load_settings().database_url.get_secret_value()
    for host, _ in postgres_addresses(url)[0]:
        if host not in LOCAL_HOSTS and not host.startswith("/"):
            remedy = "unset it to seed the one of `make dev`"
            sys.exit(f"DATABASE_URL: {host} is another machine; {remedy}")
    connection = await asyncpg.connect(url)
    try:
        count = await seed(connection)
    except asyncpg.PostgresError as error:
        sys.exit(f"scripts/seed.py: {type(error).__name__}: {error}")
    finally:
        await connection.close()
    sys.stdout.write(f"{count} rows are in the database; add yours in scripts/seed.py\n")


if __name__ == "__main__":
    asyncio.run(main())
