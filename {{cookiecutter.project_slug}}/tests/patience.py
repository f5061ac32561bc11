"""Limits of time that end a test which would wait forever, and nothing else.

They are longer on a machine that runs other things as well. A limit that a test is about stays a
number.
"""

import asyncio
import os


def slowness() -> float:
    """Return how many times slower a process is on this machine for the other ones that run.

    1.0 as long as each process that wants a CPU has one.
    """
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def patience(seconds: float) -> asyncio.Timeout:
    """Limit the time of a block; `seconds` are those of a machine that runs nothing else."""
    return asyncio.timeout(seconds * slowness())
