"""The tables of conversations."""

from alembic import op

revision = "0004_conversations"
down_revision = "0003_jobs"


def upgrade() -> None:
    """Create the tables."""
    op.execute("""
        create table conversations (
            conversation_id uuid primary key default gen_random_uuid(),
            created_at timestamptz not null default now(),
            ended_at timestamptz,
            score smallint check (score between 0 and 100)
        )
    """)
    op.execute("""
        create table conversation_lines (
            conversation_id uuid not null references conversations on delete cascade,
            number bigint generated always as identity,
            text text not null check (length(text) between 1 and 2000),
            primary key (conversation_id, number)
        )
    """)


def downgrade() -> None:
    """Drop the tables."""
    op.execute("drop table conversation_lines, conversations")
