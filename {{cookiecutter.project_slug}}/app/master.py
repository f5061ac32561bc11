"""The gunicorn master: it announces the end before it signals, and starts a worker's successor first."""

import mmap
import signal
from typing import Any

from gunicorn.arbiter import Arbiter

from app.metrics_server import MetricsProcess

#: What master and workers share, mapped before they are forked: one byte for the pod, and one for each worker. A signal
#: alone could be lost: in a worker that was forked just now, gunicorn's own handlers still swallow it.
_SHARED = mmap.mmap(-1, mmap.PAGESIZE)
_POD, _GRACEFULLY, _QUICKLY = 0, 1, 2
_ASKED = 1


def is_draining() -> bool:
    """Tell whether the whole pod is ending, and not just this worker."""
    return _SHARED[_POD] != 0


def is_quick() -> bool:
    """Tell whether the pod is ending with SIGINT or SIGQUIT."""
    return _SHARED[_POD] == _QUICKLY


def _slot(age: int) -> int:
    return 1 + age % (len(_SHARED) - 1)


def enlist(age: int) -> None:
    """Clear the byte of a worker that is about to be forked; gunicorn counts them by `age`."""
    _SHARED[_slot(age)] = 0


def ask_for_successor(age: int) -> None:
    """Have the master start another worker, and then retire this one."""
    _SHARED[_slot(age)] = _ASKED


class ServiceArbiter(Arbiter):  # type: ignore[misc]
    """gunicorn's master, with another idea of the signals TERM, HUP and USR2."""

    _num_workers: int
    metrics: MetricsProcess  # gunicorn.conf.py starts it

    def stop(self, graceful: bool = True) -> None:
        """End the pod. The workers learn it before any of them is signalled."""
        _SHARED[_POD] = max(_SHARED[_POD], _GRACEFULLY if graceful else _QUICKLY)
        super().stop(graceful)

    def reload(self) -> None:
        """SIGHUP: replace every worker.

        Nothing is read anew: the app is preloaded with its settings, and a wrong one must not end a master that serves.
        Nor does it wait for the old ones, as gunicorn does: a SIGTERM would not be seen meanwhile.
        """
        for worker in list(self.WORKERS.values()):
            self._replace(worker)

    def handle_usr2(self) -> None:
        """SIGUSR2: a second master would ask for the same metrics address, and containers never use it."""
        self.log.warning("SIGUSR2 is ignored: start a new instance instead")

    def manage_workers(self) -> None:
        """Replace who asks for it; those who leave do not count among the workers that there shall be.

        gunicorn calls this once a second, so it is also where a metrics process that was killed is replaced.
        """
        self.metrics.ensure(self.LISTENERS)
        for worker in list(self.WORKERS.values()):
            if _SHARED[_slot(worker.age)] == _ASKED:
                self._replace(worker)
        wanted = self._num_workers
        self._num_workers += sum(worker.is_leaving for worker in self.WORKERS.values())
        try:
            super().manage_workers()
        finally:
            self._num_workers = wanted

    def _replace(self, worker: Any) -> None:
        if not worker.is_leaving:
            worker.is_leaving = True
            self.spawn_worker()
            self.kill_worker(worker.pid, signal.SIGTERM)


def take_over(arbiter: Any) -> None:
    """Make gunicorn's arbiter ours (`when_ready` of gunicorn.conf.py): gunicorn has no setting for its class."""
    arbiter.__class__ = ServiceArbiter
