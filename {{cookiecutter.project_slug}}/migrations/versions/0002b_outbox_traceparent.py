"""Each event of the outbox keeps the trace that has written it."""

from alembic import op

revision = "0002b_outbox_traceparent"
down_revision = "0002_patterns"


def upgrade() -> None:
    """Add the column, which is null in events of requests without a trace."""
    op.execute("alter table outbox add column traceparent text")


def downgrade() -> None:
    """Drop the column."""
    op.execute("alter table outbox drop column traceparent")
