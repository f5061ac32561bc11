"""The directory where workers keep their counts: owned by one instance, emptied of the dead, read on each scrape."""

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


@contextlib.contextmanager
def _locked(directory: Path, operation: int) -> Iterator[None]:
    with (directory / ".lock").open("a") as file:
        fcntl.flock(file, operation)
        yield


def claim_directory(directory: Path) -> IO[str]:
    """Make the directory and empty it of an earlier run's files. Keep what this returns: it keeps other instances out.

    Raises `OSError` if the directory cannot be used, or is another instance's: the two would erase each other's counts.
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
    """Add a dead worker's counts to the archive and delete its files; what a killed one left half-written is lost.

    prometheus_client keeps the files of the dead for ever: after 1,000 recycled workers a scrape takes 1.5 s.
    """
    with _locked(directory, fcntl.LOCK_EX):
        for file in directory.glob(f"*_{pid}.db"):
            kind, values = file.name.split("_")[0], []
            try:
                values = list(MmapedDict.read_all_values_from_file(str(file)))
            except Exception:
                logging.getLogger("app.metrics").exception("the counts in %s are lost", file.name)
            if values and kind != "gauge":  # a gauge ends with its process
                archive = MmapedDict(str(directory / f"{kind}_archive.db"))
                for key, value, _, _ in values:
                    archive.write_value(key, archive.read_value(key)[0] + value, 0.0)
                archive.close()
            file.unlink()


class WorkersCollector(Collector):
    """Collects the values of all workers, dead and alive."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def collect(self) -> Iterable[Metric]:  # noqa: D102
        time.sleep(1.5 * FLUSH_SECONDS)  # what was answered before the scrape is in it
        with _locked(self.directory, fcntl.LOCK_SH):
            # A worker makes a file, and gives it its size a moment later: prometheus_client fails in between.
            files = [str(file) for file in self.directory.glob("*.db") if file.stat().st_size]
            return list(MultiProcessCollector.merge(files))
