"""Create the table widgets."""

from alembic import op

revision = "widgets"
down_revision = None


def upgrade() -> None:
    """Create the table."""
    op.execute("""
        create table widgets (
            widget_id uuid primary key default gen_random_uuid(),
            name text not null,
            created_at timestamptz not null default now(),
            check (length(name) between 1 and 100)
        )
    """)
    op.execute("""
        create index on widgets
        (created_at desc, widget_id desc)
    """)


def downgrade() -> None:
    """Drop the table."""
    op.execute("drop table widgets")
