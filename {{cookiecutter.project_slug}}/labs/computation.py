"""The computation of a message, in a module of its own: a process of a pool imports only this."""

import time

#: The type of the worker's jobs.
KIND = "lab.message"
#: Long enough to be measured.
SAMPLE = 200_000


def compute(steps: int) -> int:
    """Keep a CPU busy in Python, as a parser or a small model does."""
    return sum(number * number % 7 for number in range(steps))


def steps_for(seconds: float) -> int:
    """Return the number of steps that need this CPU time on this machine."""
    return round(SAMPLE * seconds / min(_cpu_seconds() for _ in range(10)))


def _cpu_seconds() -> float:
    start = time.process_time()
    compute(SAMPLE)
    return time.process_time() - start
