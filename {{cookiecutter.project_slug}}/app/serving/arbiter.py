"""The gunicorn master: it announces the end before it signals, and starts a worker's successor first."""

import signal
from typing import Any

from gunicorn.arbiter import Arbiter

from app.serving import shared_flags
from app.telemetry.metrics_server import MetricsProcess


class ServiceArbiter(Arbiter):  # type: ignore[misc]
    """gunicorn's master, with another idea of the signals TERM, HUP and USR2."""

    _num_workers: int
    metrics: MetricsProcess  # gunicorn.conf.py starts it

    def stop(self, graceful: bool = True) -> None:
        """End the pod. The workers learn it before any of them is signalled."""
        shared_flags.announce_shutdown(graceful=graceful)
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
            if shared_flags.replacement_requested(worker.age):
                self._replace(worker)
        wanted = self._num_workers
        self._num_workers += sum(worker.is_retiring for worker in self.WORKERS.values())
        try:
            super().manage_workers()
        finally:
            self._num_workers = wanted

    def _replace(self, worker: Any) -> None:
        if not worker.is_retiring:
            worker.is_retiring = True
            self.spawn_worker()
            self.kill_worker(worker.pid, signal.SIGTERM)


def use_service_arbiter(arbiter: Any) -> None:
    """Make gunicorn's arbiter ours (`when_ready` of gunicorn.conf.py): gunicorn has no setting for its class."""
    arbiter.__class__ = ServiceArbiter
