"""Keyset pagination: a page begins after the last row of the previous page.

New rows therefore move no other row to another page. With `offset` they would, and each page would
cost as much as all pages before it. Order by time and ID, descending, with an index on both: `where
(created_at, id) < ($1, $2) order by created_at desc, id desc limit $3`.
"""

from datetime import UTC, datetime, timedelta
from typing import NamedTuple, Self
from uuid import UUID

#: Any text that matches is a valid cursor: 13 hex digits of microseconds, 32 of the row's ID.
PATTERN = "^[0-9a-f]{45}$"
TIME_DIGITS = 13
MAX_TIME = datetime.max.replace(tzinfo=UTC)
MAX_ID = UUID(int=2**128 - 1)
_EPOCH = datetime.fromtimestamp(0, UTC)
_MICROSECOND = timedelta(microseconds=1)


class Cursor(NamedTuple):
    """A position between two rows, by default before the newest. Opaque to clients."""

    created_at: datetime = MAX_TIME
    row_id: UUID = MAX_ID

    def __str__(self) -> str:
        microseconds = (self.created_at - _EPOCH) // _MICROSECOND
        return f"{microseconds:0{TIME_DIGITS}x}{self.row_id.hex}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the cursor of a text that matches `PATTERN`."""
        microseconds = int(text[:TIME_DIGITS], 16)
        created_at = _EPOCH + microseconds * _MICROSECOND
        return cls(created_at, UUID(text[TIME_DIGITS:]))
