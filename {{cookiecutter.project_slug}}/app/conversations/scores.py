"""The score of a conversation: a computation without I/O, for another process.

Replace it by a model. A process imports this module only, so keep its imports few.
"""

import re
from collections.abc import Sequence

POSITIVE = {"thanks", "great", "good", "perfect", "helpful", "solved", "works", "happy"}
NEGATIVE = {"bad", "broken", "wrong", "late", "never", "angry", "unhappy", "slow"}
WORD = re.compile(r"\w+")
#: The score of a conversation without any of these words.
NEUTRAL = 50


def compute_score(lines: Sequence[str]) -> int:
    """Return a number from 0, all negative, to 100, all positive."""
    words = [word for line in lines for word in WORD.findall(line.lower())]
    positive = sum(word in POSITIVE for word in words)
    negative = sum(word in NEGATIVE for word in words)
    if positive + negative == 0:
        return NEUTRAL
    return round(100 * positive / (positive + negative))
