"""The tables of app/patterns: idempotency keys, outbox, inbox."""

from alembic import op

revision = "0002_patterns"
down_revision = "0001_payments"


def upgrade() -> None:
    """Create the tables."""
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
        create table schedule (
            name text primary key,
            due_at timestamptz not null,
            succeeded_at timestamptz
        )
    """)


def downgrade() -> None:
    """Drop the tables."""
    op.execute("drop table idempotency_keys, outbox, inbox")
    # A database that was migrated before this table was added here has none.
    op.execute("drop table if exists schedule")
