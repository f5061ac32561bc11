"""Cursors of keyset pagination: the position of a row survives the way to the client and back."""

import re
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest

from app.patterns.pagination import MAX_ID, PATTERN, Cursor

EPOCH = datetime.fromtimestamp(0, UTC)


@pytest.mark.parametrize(
    "cursor",
    [
        Cursor(EPOCH, UUID(int=0)),
        Cursor(datetime(2100, 1, 1, tzinfo=UTC), MAX_ID),
        Cursor(EPOCH + timedelta(days=20_000, microseconds=1), uuid4()),
    ],
)
def test_cursor_is_parsed_from_its_text(cursor: Cursor) -> None:
    assert re.fullmatch(PATTERN, str(cursor))
    assert Cursor.parse(str(cursor)) == cursor


def test_order_of_texts_is_that_of_positions() -> None:
    """The order of `order by created_at desc, id desc`, for rows of one microsecond too."""
    positions = [
        Cursor(EPOCH + timedelta(microseconds=microsecond), UUID(int=number))
        for microsecond in (1, 15, 16, 10**15)
        for number in (0, 255, 2**128 - 1)
    ]
    assert sorted(map(str, reversed(positions))) == [str(position) for position in positions]


@pytest.mark.parametrize("text", ["0" * 45, "f" * 45])
def test_every_text_of_the_pattern_is_a_cursor(text: str) -> None:
    assert re.fullmatch(PATTERN, text)
    assert str(Cursor.parse(text)) == text


def test_default_cursor_is_newer_than_every_row() -> None:
    assert Cursor() > Cursor.parse("f" * 45)
