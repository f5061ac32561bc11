"""Memory that the master and its workers share."""

import contextlib
import ctypes
import gc


def share_memory() -> None:
    """Take what is loaded out of the collector's sight, so that processes forked from here go on sharing it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(
        10_000, 20, 20
    )  # by default the collector runs for every few requests, and finds nothing
    with contextlib.suppress(AttributeError):  # not in every C library
        ctypes.CDLL(None).malloc_trim(
            0
        )  # gives back 10 MB, where the modules have just been compiled
