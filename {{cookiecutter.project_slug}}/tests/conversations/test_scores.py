"""The score of a conversation, from 0 to 100."""

import pytest

from app.conversations.scores import compute_score


@pytest.mark.parametrize(
    ("lines", "score"),
    [
        (["Thanks, that works!"], 100),
        (["It is BROKEN.", "I am angry"], 0),
        (["It was late.", "Now it is solved."], 50),
        (["Hello."], 50),
        (["great great bad"], 67),
    ],
)
def test_score_is_the_share_of_positive_words(lines: list[str], score: int) -> None:
    assert compute_score(lines) == score
