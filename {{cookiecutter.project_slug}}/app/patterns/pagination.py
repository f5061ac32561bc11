"""Keyset pagination: a page begins after the last row of the page before, so new rows move no other to another page.

With `offset` they would, and each page would cost as much as all before it. Order by time and ID, descending, with an
index on both: `where (created_at, id) < ($1, $2) order by created_at desc, id desc limit $3`.
"""

from datetime import UTC, datetime, timedelta
from typing import NamedTuple, Self
from uuid import UUID

#: What matches it is a cursor; nothing else has to be refused.
PATTERN = "^[0-9a-f]{45}$"
_EPOCH = datetime.fromtimestamp(0, UTC)


class Cursor(NamedTuple):
    """A place between two rows; the default is before the newest. As text it is opaque to clients."""

    created_at: datetime = datetime.max.replace(tzinfo=UTC)
    row_id: UUID = UUID(int=2**128 - 1)

    def __str__(self) -> str:
        return f"{(self.created_at - _EPOCH) // timedelta(microseconds=1):013x}{self.row_id.hex}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the place that a text which matches `PATTERN` stands for."""
        return cls(_EPOCH + timedelta(microseconds=int(text[:13], 16)), UUID(text[13:]))
