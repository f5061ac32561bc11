"""Charge each payment once: idempotency keys, outbox, inbox."""

from alembic import op

revision = "0002_patterns"
down_revision = "0001_payments"


def upgrade() -> None:
    """Create the tables of app/patterns, and add columns to payments."""
    op.execute("""
        create table idempotency_keys (
            scope text not null,
            key text not null,
            fingerprint bytea not null,
            status smallint not null,
            headers text not null,
            body bytea not null,
            created_at timestamptz not null default now(),
            primary key (scope, key)
        )
    """)
    op.execute("create index on idempotency_keys (created_at)")
    op.execute("""
        create table outbox (
            id bigint generated always as identity primary key,
            topic text not null,
            event_id uuid not null,
            type text not null,
            payload text not null,
            created_at timestamptz not null default now()
        )
    """)
    op.execute("create unique index on outbox (topic, event_id)")
    op.execute("""
        create table inbox (
            message_id uuid primary key,
            received_at timestamptz not null default now()
        )
    """)
    op.execute("create index on inbox (received_at)")
    op.execute("""
        alter table payments
            add request_id text not null default '',
            add announce_at timestamptz not null default now() + interval '1 minute',
            add constraint payments_status check (status in ('pending', 'settled'))
    """)
    op.execute("create index on payments (created_at desc, payment_id desc)")
    op.execute("create index on payments (announce_at) where status = 'pending'")


def downgrade() -> None:
    """Drop the tables and the columns."""
    op.execute("drop table idempotency_keys, outbox, inbox")
    op.execute("drop index payments_created_at_payment_id_idx")
    op.execute("""
        alter table payments
            drop request_id,
            drop announce_at,
            drop constraint payments_status
    """)
