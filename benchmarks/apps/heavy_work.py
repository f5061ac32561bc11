"""CPU-heavy work, in a module of its own: a process of the pool imports no more than this."""

STEPS = 400_000


def work() -> int:
    """Keep a CPU busy for some ten milliseconds in Python, as a parser or a template does."""
    return sum(number * number % 7 for number in range(STEPS))
