"""Makes the processes that this one forks independent of it.

A forked process inherits the handlers of signals, and the descriptor to which Python writes each
signal for the event loop. So SIGTERM to the child would not end the child, but this process. From
Python 3.12 on, asyncio itself resets the descriptor: https://github.com/python/cpython/issues/66285
"""

import faulthandler
import os
import signal
import threading
from collections.abc import Callable, Iterable

#: The signals that a server or a worker handles.
SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
    signal.SIGABRT,
)

# The signal mask before a fork, of the thread that forks.
_before_fork = threading.local()


def isolate_children(descriptors: Callable[[], Iterable[int]] = tuple) -> None:
    """Have each process that this one forks from now on start with Python's default signals.

    `descriptors` returns those that a child must not use or keep open, such as listening sockets:
    it would hold their port when this process has ended. Signals that arrive during the fork are
    delivered after it.
    """

    def isolate() -> None:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        faulthandler.disable()  # its file is this process's
        _replace_by_null(descriptors())
        _unblock_signals()

    os.register_at_fork(
        before=_block_signals, after_in_parent=_unblock_signals, after_in_child=isolate
    )


def _block_signals() -> None:
    _before_fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _unblock_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _before_fork.mask)


def _replace_by_null(descriptors: Iterable[int]) -> None:
    """Replace the descriptors by /dev/null.

    Closed ones would be reused, and closed again by the objects to which they belonged.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(null, descriptor, inheritable=False)
    os.close(null)
