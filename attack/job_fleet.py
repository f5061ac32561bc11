"""Workers that are replaced when a fault ends them, as by a platform."""

import contextlib
import random
import signal
import time
from collections.abc import Iterator

import psutil
from tests.jobs.conftest import Worker
from tests.service_process import eventually

LEASE_SECONDS = 2.0
#: Time limit for a worker to end after SIGTERM.
STOP_SECONDS = 20


class Fleet:
    """Workers with the same settings."""

    def __init__(self, settings: dict[str, str], size: int) -> None:
        self.settings = settings | {"TEST_LEASE_SECONDS": str(LEASE_SECONDS)}
        self.workers = [self.start() for _ in range(size)]
        self.ended: list[Worker] = []

    def start(self) -> Worker:
        """Start a worker."""
        return Worker("jobs_worker", **self.settings)

    def wait_until_ready(self) -> None:
        """Wait until all workers are ready."""
        eventually(lambda: all(worker.is_ready() for worker in self.workers))

    def replace(self, worker: Worker) -> None:
        """Start another worker for one that has ended."""
        self.workers.remove(worker)
        self.ended.append(worker)
        self.workers.append(self.start())

    def replace_killed(self) -> None:
        """Start another worker for each that one of its jobs has killed."""
        for worker in list(self.workers):
            if worker.process.poll() is not None:
                assert worker.process.returncode == -signal.SIGKILL, worker.text
                self.replace(worker)

    def stop(self, number: int) -> None:
        """End one worker by a signal once it is ready, and start another."""
        worker = random.choice(self.workers)
        eventually(worker.is_ready)
        worker.process.send_signal(number)
        expected = 0 if number == signal.SIGTERM else -number
        assert worker.process.wait(STOP_SECONDS) == expected, worker.text
        self.replace(worker)

    def terminate(self) -> None:
        """End one worker as a rolling update does."""
        self.stop(signal.SIGTERM)

    def kill(self) -> None:
        """End one worker as a lack of memory does."""
        self.stop(signal.SIGKILL)

    def suspend(self) -> None:
        """Suspend one worker for longer than its leases, as a machine that swaps does."""
        worker = psutil.Process(random.choice(self.workers).process.pid)
        worker.suspend()
        time.sleep(2 * LEASE_SECONDS)
        worker.resume()


@contextlib.contextmanager
def working(settings: dict[str, str], size: int) -> Iterator[Fleet]:
    """Run workers during the block. At its end each must be ready, and end with code 0."""
    fleet = Fleet(settings, size)
    try:
        fleet.wait_until_ready()
        yield fleet
        fleet.wait_until_ready()
        for worker in fleet.workers:
            worker.process.terminate()
        codes = [worker.process.wait(STOP_SECONDS) for worker in fleet.workers]
    finally:
        for worker in fleet.workers:
            worker.process.kill()
            worker.process.wait()
        for worker in fleet.workers + fleet.ended:
            worker.output.close()
    assert codes == [0] * size
