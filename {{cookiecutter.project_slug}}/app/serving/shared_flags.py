"""What the master tells its workers about the end, and they tell it: one byte of shared memory each."""

import mmap

#: What master and workers share, mapped before they are forked: one byte for the pod, and one for each worker. A signal
#: alone could be lost: in a worker that was forked just now, gunicorn's own handlers still swallow it.
_SHARED = mmap.mmap(-1, mmap.PAGESIZE)
_POD, _GRACEFULLY, _QUICKLY = 0, 1, 2
_ASKED = 1


def is_draining() -> bool:
    """Tell whether the whole pod is ending, and not just this worker."""
    return _SHARED[_POD] != 0


def is_quick_shutdown() -> bool:
    """Tell whether the pod is ending with SIGINT or SIGQUIT."""
    return _SHARED[_POD] == _QUICKLY


def _slot(age: int) -> int:
    return 1 + age % (len(_SHARED) - 1)


def reset_flag(age: int) -> None:
    """Clear the byte of a worker that is about to be forked; gunicorn counts them by `age`."""
    _SHARED[_slot(age)] = 0


def request_replacement(age: int) -> None:
    """Have the master start another worker, and then retire this one."""
    _SHARED[_slot(age)] = _ASKED


def announce_shutdown(*, graceful: bool) -> None:
    """Tell all workers that the pod ends; a quick end is never taken back."""
    _SHARED[_POD] = max(_SHARED[_POD], _GRACEFULLY if graceful else _QUICKLY)


def replacement_requested(age: int) -> bool:
    """Tell whether this worker has asked to be replaced."""
    return _SHARED[_slot(age)] == _ASKED
