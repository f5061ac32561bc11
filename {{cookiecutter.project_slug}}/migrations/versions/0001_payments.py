"""The table of payments."""

from alembic import op

revision = "0001_payments"
down_revision = None


def upgrade() -> None:
    """Create the table."""
    op.execute("""
        create table payments (
            payment_id uuid primary key default gen_random_uuid(),
            amount bigint not null check (amount > 0),
            currency char(3) not null,
            reference text not null check (length(reference) between 1 and 64),
            status text not null default 'pending',
            created_at timestamptz not null default now(),
            request_id text not null default '',
            announce_at timestamptz not null default now() + interval '1 minute',
            constraint payments_status check (status in ('pending', 'settled'))
        )
    """)
    op.execute("create index on payments (created_at desc, payment_id desc)")
    op.execute("create index on payments (announce_at) where status = 'pending'")


def downgrade() -> None:
    """Drop the table."""
    op.execute("drop table payments")
