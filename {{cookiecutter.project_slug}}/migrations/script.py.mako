"""${message}."""

from alembic import op

revision = "${up_revision}"
down_revision = ${f'"{down_revision}"' if down_revision else None}


def upgrade() -> None:
    """Apply the change."""
    op.execute("")


def downgrade() -> None:
    """Revert the change."""
    op.execute("")
