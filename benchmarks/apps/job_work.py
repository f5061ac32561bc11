"""The computation of a job, in a module of its own: a process of the pool imports only this."""


def compute(steps: int) -> int:
    """Keep a CPU busy in Python, as a parser or a small model does."""
    return sum(number * number % 7 for number in range(steps))
