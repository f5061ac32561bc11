"""The metrics of all processes: what a scrape reads from their files.

A process writes to files of its own. Those of dead processes are merged into archives.
"""

import functools
import json
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from prometheus_client import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from app.tasks import StateLog
from app.telemetry import exemplars
from app.telemetry.http_metrics import DURATION, FLUSH_SECONDS, LABELS
from app.telemetry.metric_files import NEVER_SET, Entry, encode_entries, read_entries, replace_file

#: Wait of a scrape for the counts that workers have not flushed yet.
SCRAPE_DELAY_SECONDS = 1.5 * FLUSH_SECONDS
#: Dead processes whose gauges with `multiprocess_mode="all"` are kept, each a series of its own.
MAX_DEAD_PROCESSES = 100
#: A worker sets this gauge to 1 when it starts to serve, see process_metrics.py.
_SERVING = '["worker_processes", '
_ARCHIVE = "archive"

logger = logging.getLogger("app.metrics")


class _File(NamedTuple):
    """A file, whose name is the type of its metrics, the mode of its gauges, and the process."""

    path: Path
    kind: str
    process: str

    @classmethod
    def from_path(cls, path: Path) -> "_File":
        kind, _, process = path.stem.rpartition("_")
        return cls(path, kind, process)

    @property
    def is_archive(self) -> bool:
        return self.process == _ARCHIVE

    @property
    def is_gauge(self) -> bool:
        return self.kind.startswith("gauge")

    @property
    def is_live_gauge(self) -> bool:
        """Whether its values end with their process."""
        return self.kind.startswith("gauge_live")


class _Key(NamedTuple):
    metric: str
    sample: str
    labels: tuple[tuple[str, str], ...]
    help: str


class WorkersCollector(Collector):
    """Collects the values of all processes, running and dead.

    It belongs to the process that creates it, the master: a gauge that is set when the
    application is imported keeps its value while the master runs.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.master = str(os.getpid())
        # A process is in its own files or in the archive, but not in both.
        self.lock = threading.Lock()
        self.log = StateLog(logger, "cannot archive metrics", "metrics are archived again")

    def collect(self) -> Iterable[Metric]:  # noqa: D102
        # Every response before the scrape is counted in it.
        time.sleep(SCRAPE_DELAY_SECONDS)
        with self.lock:
            entries = {file: read_entries(file.path) for file in self._files()}
        metrics = _merge({file: entries[file] for file in self._counted(entries)})
        newest = exemplars.read(exemplars.files(self.directory))
        for metric in metrics:
            if newest and metric.name == DURATION:
                exemplars.add(metric, newest, LABELS)
            yield metric

    def archive_dead(self) -> None:
        """Merge the files of dead processes into one archive for each kind, and delete them.

        prometheus_client keeps the files of dead processes: after 1,000 recycled workers a scrape
        takes 1.5 s. While the archive cannot be written, the files stay, and are counted.
        """
        dead: dict[str, list[_File]] = defaultdict(list)
        try:
            self.directory.stat()
            with self.lock:
                for file in self._files():
                    if not file.is_archive and not _is_running(file.process):
                        dead[file.kind].append(file)
                for path, process in exemplars.files(self.directory).items():
                    if not _is_running(process):
                        path.unlink(missing_ok=True)
                for kind, files in dead.items():
                    self._archive(self.directory / f"{kind}_{_ARCHIVE}.db", files)
        except OSError as error:
            self.log.failed(f"{error.filename}: {error.strerror}")
        else:
            self.log.succeeded()

    def _files(self) -> list[_File]:
        return [_File.from_path(path) for path in sorted(self.directory.glob("*.db"))]

    def _archive(self, archive: Path, files: list[_File]) -> None:
        # A live gauge ends with its process.
        if not files[0].is_live_gauge:
            entries = _read_or_lose(archive) if archive.exists() else {}
            for file in files:
                for key, entry in _read_or_lose(file.path).items():
                    _add(entries, file, key, entry)
            content = encode_entries(_newest_processes(entries, files[0].kind))
            try:
                replace_file(archive, content)
            except OSError:
                if not _makes_room(files, len(content)):
                    raise
                _delete(files)
                replace_file(archive, content)
        _delete(files)

    def _counted(self, entries: dict[_File, dict[str, Entry]]) -> list[_File]:
        """Return the files that count: live gauges only of workers that serve, and the master.

        Other processes are those that a worker has forked or started, for example a process pool.
        """
        running = {file.process for file in entries if _is_running(file.process)}
        serving = {file.process for file in entries if _is_serving(entries[file])}
        # A server without `WorkerMetrics`: every process may be a worker.
        live = running & (serving | {self.master}) if serving & running else running
        return [file for file in entries if not file.is_live_gauge or file.process in live]


def _makes_room(files: list[_File], needed: int) -> bool:
    """Return whether there is space for these bytes once the files are deleted.

    They can be what fills the directory: 1,000 label sets are 4.3 MB for each process.
    """
    system = os.statvfs(files[0].path.parent)
    freed = sum(file.path.stat().st_blocks * 512 for file in files)
    return system.f_bavail * system.f_frsize + freed >= needed


def _delete(files: list[_File]) -> None:
    for file in files:
        file.path.unlink(missing_ok=True)


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, ValueError):
        return False
    return not _is_zombie(process)


def _is_zombie(process: str) -> bool:
    """Return whether a process has ended, but its parent has not waited for it. Linux only."""
    try:
        status = Path("/proc", process, "stat").read_text(errors="replace")
    except OSError:
        return False
    # After the name of the program, which is in parentheses and may contain any character
    state = status.rpartition(")")[2].split()[0]
    return state == "Z"


def _is_serving(entries: dict[str, Entry]) -> bool:
    return any(key.startswith(_SERVING) and value == 1 for key, (value, _) in entries.items())


@functools.lru_cache(maxsize=100_000)
def _parse(key: str) -> _Key:
    metric, sample, labels, text = json.loads(key)
    return _Key(metric, sample, tuple(sorted(labels.items())), text)


def _read_or_lose(path: Path) -> dict[str, Entry]:
    """Read a file; if it is damaged, return nothing and log that. Raises `OSError`."""
    try:
        entries = read_entries(path)
        for key in entries:
            _parse(key)
    except OSError:
        raise
    except Exception:
        logger.exception("metrics lost, cannot read %s", path.name)
        return {}
    return entries


def _add(archive: dict[str, Entry], file: _File, key: str, entry: Entry) -> None:
    """Add an entry of a dead process to an archive, as `MultiProcessCollector` would merge them."""
    if file.is_gauge and entry[1] == NEVER_SET:
        return
    if file.kind == "gauge_all":
        archive[_with_process(key, file.process)] = entry
        return
    old = archive.get(key)
    if old is None:
        archive[key] = entry
    elif file.kind == "gauge_min":
        archive[key] = min(old, entry)
    elif file.kind == "gauge_max":
        archive[key] = max(old, entry)
    elif file.kind == "gauge_mostrecent":
        archive[key] = max(old, entry, key=_timestamp)
    else:
        archive[key] = (old[0] + entry[0], 0.0)


def _timestamp(entry: Entry) -> float:
    return entry[1]


def _with_process(key: str, process: str) -> str:
    """Add the label `pid` to a key."""
    metric, sample, labels, text = json.loads(key)
    return json.dumps([metric, sample, labels | {"pid": process}, text], sort_keys=True)


def _newest_processes(entries: dict[str, Entry], kind: str) -> dict[str, Entry]:
    """Bound the archive of gauges that have a series for each process, oldest first."""
    if kind != "gauge_all":
        return entries
    process_of = {key: dict(_parse(key).labels)["pid"] for key in entries}
    processes = list(dict.fromkeys(process_of.values()))
    newest = set(processes[-MAX_DEAD_PROCESSES:])
    return {key: entry for key, entry in entries.items() if process_of[key] in newest}


def _merge(entries: dict[_File, dict[str, Entry]]) -> Iterable[Metric]:
    """Return the metrics as `MultiProcessCollector.merge` does, without gauges that are not set.

    A process starts with 0 in each of its gauges. That 0 counts only if no process has set it.
    """
    set_gauges = {
        _series(file.kind, key)
        for file, values in entries.items()
        for key, (_, timestamp) in values.items()
        if file.is_gauge and timestamp != NEVER_SET
    }
    metrics: dict[str, Metric] = {}
    for file, values in entries.items():
        for key, entry in values.items():
            is_unset = file.is_gauge and entry[1] == NEVER_SET
            if not (is_unset and _series(file.kind, key) in set_gauges):
                _add_sample(metrics, file, key, entry)
    merged: Iterable[Metric] = MultiProcessCollector._accumulate_metrics(metrics, accumulate=True)
    return merged


def _series(kind: str, key: str) -> tuple[object, ...]:
    """Return what identifies a gauge in all processes."""
    parsed = _parse(key)
    labels = tuple(label for label in parsed.labels if label[0] != "pid")
    return kind, parsed.sample, labels


def _add_sample(metrics: dict[str, Metric], file: _File, key: str, entry: Entry) -> None:
    """Add an entry to its metric, for `MultiProcessCollector._accumulate_metrics`."""
    kind, _, mode = file.kind.partition("_")
    parsed = _parse(key)
    labels = parsed.labels
    if file.is_gauge and not file.is_archive:
        labels = (*labels, ("pid", file.process))
    metric = metrics.setdefault(parsed.metric, Metric(parsed.metric, parsed.help, kind))
    metric._multiprocess_mode = mode  # type: ignore[attr-defined]
    metric.add_sample(parsed.sample, labels, *entry)  # type: ignore[arg-type]
