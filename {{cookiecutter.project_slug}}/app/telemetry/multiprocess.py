"""The directory of the workers' metrics files.

One instance owns it, the counts of dead workers are archived in it, and each scrape reads it.
"""

import contextlib
import fcntl
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from prometheus_client import Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from app.telemetry.http_metrics import FLUSH_SECONDS

#: Wait of a scrape for the counts that workers have not flushed yet.
SCRAPE_DELAY_SECONDS = 1.5 * FLUSH_SECONDS

logger = logging.getLogger("app.metrics")


def claim_directory(directory: Path) -> IO[str]:
    """Create the directory, delete the files of an earlier run, return a lock.

    Keep the lock open: it keeps other instances out, which would delete the counts of this one.
    Raises `OSError` if the directory cannot be used, `BlockingIOError` if another instance has it.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = (directory / ".owner").open("a")
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner.close()
        raise
    for file in directory.glob("*.db"):
        file.unlink()
    return owner


def archive_worker(directory: Path, pid: int) -> None:
    """Add the counts of a dead worker to the archive, and delete its files.

    prometheus_client keeps the files of dead workers: after 1,000 recycled workers a scrape takes
    1.5 s. A file that a killed worker left half-written is lost, with a log line.
    """
    with _locked(directory, fcntl.LOCK_EX):
        for file in directory.glob(f"*_{pid}.db"):
            kind = file.name.split("_")[0]
            is_gauge = kind == "gauge"  # the value of a gauge ends with its process
            try:
                counts = _read_counts(file)
            except Exception:
                logger.exception("metrics lost, cannot read %s", file.name)
                counts = {}
            if counts and not is_gauge:
                _add_counts(directory / f"{kind}_archive.db", counts)
            file.unlink()


class WorkersCollector(Collector):
    """Collects the values of all workers, running and dead."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def collect(self) -> Iterable[Metric]:  # noqa: D102
        # Every response before the scrape is counted in it.
        time.sleep(SCRAPE_DELAY_SECONDS)
        with _locked(self.directory, fcntl.LOCK_SH):
            # A worker creates a file empty; prometheus_client fails until it has its size.
            files = [str(file) for file in self.directory.glob("*.db") if file.stat().st_size]
            return list(MultiProcessCollector.merge(files))


@contextlib.contextmanager
def _locked(directory: Path, operation: int) -> Iterator[None]:
    """Exclude scrapes while a worker is archived: it would be counted twice."""
    with (directory / ".lock").open("a") as file:
        fcntl.flock(file, operation)
        yield


def _read_counts(file: Path) -> dict[str, float]:
    """Return the values of a file by key: metric and labels as JSON.

    Raises `RuntimeError`, among others, if the file is damaged.
    """
    values = MmapedDict.read_all_values_from_file(str(file))
    return {key: value for key, value, _, _ in values}


def _add_counts(file: Path, counts: dict[str, float]) -> None:
    """Add counts to those of an archive, which need not exist yet."""
    archive = MmapedDict(str(file))
    for key, count in counts.items():
        total = archive.read_value(key)[0] + count
        archive.write_value(key, total, 0.0)
    archive.close()
