"""The lifecycle of a process: its shutdown, and its independence from the children that it forks.

The serving runtime reports the shutdown to the application. Without this runtime, as in tests or
under another server, nothing is reported.
"""

import contextlib
import faulthandler
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

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


def _never() -> bool:
    return False


@dataclass
class Lifecycle:
    """The shutdown of this process, in `app.state.lifecycle`.

    The serving runtime fills it in; the readiness probe and the background tasks read it. So the
    application knows of its shutdown without importing the server.
    """

    #: Returns whether the whole pod is draining, and not just this worker retiring.
    is_draining: Callable[[], bool] = _never
    #: The time, by `time.monotonic()`, at which requests and background tasks are cancelled. The
    #: serving runtime sets it to infinity until shutdown.
    closing_deadline: float = 0.0
    #: Whether this process, alone or with the pod, accepts no more connections: its streams end.
    is_retiring: bool = False
    _listeners: set[Callable[[], None]] = field(default_factory=set)

    def retire(self) -> None:
        """Have streams end. The serving runtime calls it once, after the drain."""
        self.is_retiring = True
        for notify in list(self._listeners):
            notify()

    @contextlib.contextmanager
    def on_retirement(self, notify: Callable[[], None]) -> Iterator[None]:
        """Call `notify` if the process retires during the block."""
        self._listeners.add(notify)
        try:
            yield
        finally:
            self._listeners.discard(notify)

    def seconds_left(self) -> float:
        """Return the seconds until background tasks are cancelled, negative after it."""
        return self.closing_deadline - time.monotonic()

    def may_cancel_requests(self) -> bool:
        """Return whether a cancellation can be the server's: shutdown, or another server's."""
        return self.closing_deadline < math.inf


#: The lifecycle of this process. Not the application's own: a team may wrap the application in
#: another, through which the serving runtime cannot reach it.
PROCESS = Lifecycle()


def isolate_children(descriptors: Callable[[], Iterable[int]] = tuple) -> None:
    """Have each process that this one forks from now on start with Python's default signals.

    It would inherit the handlers of signals, and the descriptor to which Python writes each signal
    for the event loop: SIGTERM to the child would not end the child, but this process. From Python
    3.12 on, asyncio itself resets the descriptor: https://github.com/python/cpython/issues/66285

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
