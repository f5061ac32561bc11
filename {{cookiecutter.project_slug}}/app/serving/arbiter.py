"""The gunicorn master, with announced shutdowns and workers replaced one by one."""

import signal
from typing import Any

from gunicorn.arbiter import Arbiter

from app.serving import shared_flags
from app.telemetry.metrics_server import MetricsProcess
from app.telemetry.pod_metrics import MasterMetrics


class ServiceArbiter(Arbiter):  # type: ignore[misc]
    """gunicorn's master with its own handling of SIGTERM, SIGHUP and SIGUSR2."""

    _num_workers: int
    metrics: MetricsProcess  # gunicorn.conf.py starts it
    metrics_of_workers: MasterMetrics
    #: Workers up to this age, which is their number in gunicorn, are replaced.
    replaced_age = 0

    def stop(self, graceful: bool = True) -> None:
        """Shut down the pod. The shutdown is announced before any worker is signaled."""
        shared_flags.announce_shutdown(graceful=graceful)
        super().stop(graceful)

    def reload(self) -> None:
        """SIGHUP: replace every worker.

        Nothing is read again: the application is preloaded with its settings, and an invalid
        setting must not stop a master that serves. Unlike gunicorn's, it does not wait for the old
        workers, since a SIGTERM would not be seen meanwhile. `manage_workers` replaces them.
        """
        self.replaced_age = self.worker_age

    def handle_usr2(self) -> None:
        """SIGUSR2: do nothing.

        gunicorn would start a second master, which needs the same metrics address. Containers
        never use it.
        """
        self.log.warning("SIGUSR2 is ignored: start a new instance instead")

    def manage_workers(self) -> None:
        """Replace the workers that are due, and keep the number of workers.

        gunicorn calls this after each signal and once a second, so a metrics process that was
        killed is replaced here too.
        """
        self.metrics.ensure(self.LISTENERS)
        self.metrics_of_workers.planned.set(self._num_workers)
        for worker in list(self.WORKERS.values()):
            if self._is_due(worker) and self._retiring_workers() < self._num_workers:
                self._replace(worker)
        self._keep_number_of_workers()

    def _is_due(self, worker: Any) -> bool:
        """Return whether a worker is to be replaced: by SIGHUP, or since it requests it."""
        is_requested = shared_flags.replacement_requested(worker.age)
        return not worker.is_retiring and (worker.age <= self.replaced_age or is_requested)

    def _retiring_workers(self) -> int:
        """Return the number of retiring workers, which is limited to that of the others.

        A worker retires for up to `GRACEFUL_TIMEOUT_SECONDS`. Without the limit, each SIGHUP in
        this time would add the memory of all workers once more.
        """
        return sum(worker.is_retiring for worker in self.WORKERS.values())

    def _keep_number_of_workers(self) -> None:
        """Start and stop workers as gunicorn does, without counting those that are retiring."""
        configured_workers = self._num_workers
        self._num_workers += self._retiring_workers()
        try:
            super().manage_workers()
        finally:
            self._num_workers = configured_workers

    def _replace(self, worker: Any) -> None:
        """Start a worker, then retire this one."""
        worker.is_retiring = True
        self.spawn_worker()
        self.kill_worker(worker.pid, signal.SIGTERM)


def use_service_arbiter(arbiter: Any) -> None:
    """Turn gunicorn's arbiter into a `ServiceArbiter`, once it has its listening sockets.

    gunicorn has no setting for its class.
    """
    arbiter.__class__ = ServiceArbiter
    # gunicorn never unlinks the sockets of systemd; the same holds for every inherited socket.
    arbiter.systemd = _has_inherited_sockets(arbiter)
    arbiter.worker_class.has_inherited_sockets = arbiter.systemd


def _has_inherited_sockets(arbiter: Any) -> bool:
    """Return whether another process has opened the listening sockets, and may use them again.

    systemd passes them in `LISTEN_FDS`, another supervisor as `--bind fd://3`, and a gunicorn that
    replaces itself in `GUNICORN_FD`.
    """
    has_bound_descriptor = any(isinstance(address, int) for address in arbiter.cfg.address)
    return arbiter.systemd or arbiter.master_pid != 0 or has_bound_descriptor
