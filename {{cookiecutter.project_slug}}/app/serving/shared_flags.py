"""Flags in memory that the master and its workers share.

The master announces the shutdown of the pod in the first byte. Each worker has one of the other
bytes, in which it requests its replacement, and notes its shutdown. The memory is mapped before the
workers are forked.

A signal alone can be lost: in a worker that has just been forked, gunicorn's own handlers still
swallow it.
"""

import mmap

_FLAGS = mmap.mmap(-1, mmap.PAGESIZE)

_SHUTDOWN_INDEX = 0
_GRACEFUL_SHUTDOWN = 1
_QUICK_SHUTDOWN = 2

_FIRST_WORKER_INDEX = 1
_REPLACEMENT_REQUESTED = 1
_FINISHED = 2


def announce_shutdown(*, graceful: bool) -> None:
    """Announce the shutdown of the pod to all workers. A quick shutdown is never revoked."""
    shutdown = _GRACEFUL_SHUTDOWN if graceful else _QUICK_SHUTDOWN
    _FLAGS[_SHUTDOWN_INDEX] = max(_FLAGS[_SHUTDOWN_INDEX], shutdown)


def is_draining() -> bool:
    """Return whether the whole pod is shutting down, and not just this worker."""
    return _FLAGS[_SHUTDOWN_INDEX] != 0


def is_quick_shutdown() -> bool:
    """Return whether the pod is shutting down because of SIGINT or SIGQUIT."""
    return _FLAGS[_SHUTDOWN_INDEX] == _QUICK_SHUTDOWN


def reset_flag(age: int) -> None:
    """Clear the flag of a worker before it is forked; `age` is its number in gunicorn."""
    _FLAGS[_worker_index(age)] = 0


def request_replacement(age: int) -> None:
    """Have the master start a replacement of this worker, and then retire this one."""
    _FLAGS[_worker_index(age)] = _REPLACEMENT_REQUESTED


def replacement_requested(age: int) -> bool:
    """Return whether this worker has requested its replacement."""
    return _FLAGS[_worker_index(age)] == _REPLACEMENT_REQUESTED


def mark_finished(age: int) -> None:
    """Note that this worker has shut down, as opposed to one that is killed."""
    _FLAGS[_worker_index(age)] = _FINISHED


def is_finished(age: int) -> bool:
    """Return whether this worker has shut down."""
    return _FLAGS[_worker_index(age)] == _FINISHED


def _worker_index(age: int) -> int:
    """Return the index of a worker's flag. Ages grow forever, so indexes are reused."""
    return _FIRST_WORKER_INDEX + age % (len(_FLAGS) - _FIRST_WORKER_INDEX)
