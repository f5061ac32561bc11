<%
    import json

    # A revision, or several, in double quotes.
    def literal(value):
        if value is None:
            return "None"
        if isinstance(value, str):
            return json.dumps(value, ensure_ascii=False)
        items = ", ".join(map(literal, value))
        return f"({items},)" if len(value) == 1 else f"({items})"

    title = message.strip().rstrip(".").replace("\\", "\\\\").replace('"', "'")
    is_merge = isinstance(down_revision, (list, tuple))
%>\
"""${title}."""

% if not is_merge:
from alembic import op

% endif
revision = ${literal(up_revision)}
down_revision = ${literal(down_revision)}
% if branch_labels:
branch_labels = ${literal(branch_labels)}
% endif
% if depends_on:
depends_on = ${literal(depends_on)}
% endif


def upgrade() -> None:
    """${"Merge; nothing to apply" if is_merge else "Apply the change"}."""
% if not is_merge:
    op.execute("")
% endif


def downgrade() -> None:
    """${"Split; nothing to revert" if is_merge else "Revert the change"}."""
% if not is_merge:
    op.execute("")
% endif
