"""Memory that the master and its workers share."""

import contextlib
import ctypes
import gc

#: New objects after which the garbage collector runs. With Python's default it runs every few
#: requests, and finds nothing.
GC_THRESHOLD = 10_000


def share_memory() -> None:
    """Keep loaded modules shared between the master and the workers that it forks.

    The garbage collector writes to the objects that it visits, and so copies their pages into each
    process. Here they are excluded from it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 20)
    # Returns 10 MB where the modules have just been compiled. Not in every C library.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
