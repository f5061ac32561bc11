"""Files in which a process keeps its metrics, for the metrics process to read.

prometheus_client maps these files into memory. A store to a page that a full tmpfs cannot provide
raises SIGBUS, which ends the process. Here each value is written with pwrite(2), which fails with
an error instead: the value then stays in memory, and is written once there is space.

The format is the one of `prometheus_client.mmap_dict`, which has no setting for the class that
writes it. So the import of this module replaces it, and `app/__init__.py` imports it first.
"""

import contextlib
import logging
import os
import struct
import threading
from collections.abc import Mapping
from pathlib import Path

from prometheus_client import values
from prometheus_client.mmap_dict import MmapedDict

#: The timestamp of a value that its process has never set. Others are 0 or seconds since 1970.
NEVER_SET = -1.0
#: A value, and its timestamp
Entry = tuple[float, float]

_INTEGER = struct.Struct("i")
_ENTRY = struct.Struct("dd")
#: The number of used bytes, padded
_HEADER_BYTES = 8

_lock = threading.Lock()
_files: set["MetricFile"] = set()
#: The keys of this process and its ancestors. A child that a process forks does not repeat all of
#: them in its own files: 1,000 label sets of the request histogram are 4 MB.
_known_keys: set[str] = set()
logger = logging.getLogger("app.metrics")


class MetricFile:
    """Replaces prometheus_client's `MmapedDict`: a dictionary of values, kept in a file."""

    def __init__(self, path: str) -> None:
        """Create nothing yet: the first value that is written creates the file."""
        self.path = path
        self.descriptor = -1
        self.used = _HEADER_BYTES
        self.positions: dict[str, int] = {}
        #: The values that are kept in memory only, because writing failed.
        self.unwritten: dict[str, Entry] = {}
        _files.add(self)

    def read_value(self, key: str) -> Entry:
        """Return a value and its timestamp. A new key starts at 0, visible to a scrape."""
        with _lock:
            if key in self.unwritten:
                return self.unwritten[key]
            if key in self.positions:
                data = os.pread(self.descriptor, _ENTRY.size, self.positions[key])
                value, timestamp = _ENTRY.unpack(data)
                return value, timestamp
            if key not in _known_keys:
                _known_keys.add(key)
                self._write_or_keep(key, (0.0, NEVER_SET))
            return 0.0, 0.0

    def write_value(self, key: str, value: float, timestamp: float) -> None:
        """Write a value, or keep it in memory until there is space.

        Without the lock where the value has its place in the file, and nothing waits for one.
        """
        position = self.positions.get(key)
        if position is not None and not self.unwritten:
            try:
                os.pwrite(self.descriptor, _ENTRY.pack(value, timestamp), position)
            except OSError:
                pass
            else:
                return
        with _lock:
            self._write_or_keep(key, (value, timestamp))

    def write_unwritten(self) -> None:
        """Write the values that are kept in memory. Raises `OSError` at the first that fails."""
        for key, entry in list(self.unwritten.items()):
            self._write(key, entry)
            del self.unwritten[key]

    def close(self) -> None:
        """Forget the file: prometheus_client calls it in a process that was forked."""
        _files.discard(self)
        # A child may have closed everything that it inherited.
        with contextlib.suppress(OSError):
            os.close(self.descriptor)

    def _write_or_keep(self, key: str, entry: Entry) -> None:
        try:
            self._write(key, entry)
        except OSError:
            # `retry_writes` logs it. A logger could count its own lines, and wait for itself here.
            self.unwritten[key] = entry
        else:
            self.unwritten.pop(key, None)

    def _write(self, key: str, entry: Entry) -> None:
        position = self.positions.get(key)
        if position is None:
            self._append(key, entry)
        else:
            _write_all(self.descriptor, _ENTRY.pack(*entry), position)

    def _append(self, key: str, entry: Entry) -> None:
        if self.descriptor < 0:
            # A file of this name is that of a dead process which had the same pid.
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self.descriptor = os.open(self.path, flags, 0o600)
        data = _encode(key, entry)
        _write_all(self.descriptor, data, self.used)
        used = self.used + len(data)
        # Last, so that nothing reads a part of the entry.
        _write_all(self.descriptor, _INTEGER.pack(used), 0)
        self.used = used
        self.positions[key] = used - _ENTRY.size


class WriteRetry:
    """Writes the values of this process that could not be written, and logs changes of state.

    Not with `tasks.StateLog`: every child process that has metrics would import FastAPI.
    """

    def __init__(self) -> None:
        self.is_failing = False

    def __call__(self) -> None:
        """Try once. The master and each worker do so once a second."""
        problem = self._write()
        if problem and not self.is_failing:
            logger.warning("metrics are incomplete: %s", problem)
        if self.is_failing and not problem:
            logger.info("metrics are complete again")
        self.is_failing = bool(problem)

    def _write(self) -> str:
        """Write all values. Return what went wrong, or an empty text."""
        with _lock:
            for file in list(_files):
                try:
                    file.write_unwritten()
                except OSError as error:
                    return f"cannot write {file.path}: {error.strerror}"
        return ""


retry_writes = WriteRetry()


def read_entries(path: Path) -> dict[str, Entry]:
    """Return the entries of a file by key: metric and labels as JSON.

    Raises `RuntimeError`, among others, if the file is damaged.
    """
    # Its process has created it, and not written to it yet.
    if path.stat().st_size == 0:
        return {}
    entries = MmapedDict.read_all_values_from_file(str(path))  # type: ignore[no-untyped-call]
    return {key: (value, timestamp) for key, value, timestamp, _ in entries}


def encode_entries(entries: Mapping[str, Entry]) -> bytes:
    """Return the content of a file with these entries."""
    body = b"".join(_encode(key, entry) for key, entry in entries.items())
    header = _INTEGER.pack(_HEADER_BYTES + len(body)).ljust(_HEADER_BYTES, b"\0")
    return header + body


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file as a whole or not at all. Raises `OSError`."""
    temporary = path.with_suffix(".new")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _encode(key: str, entry: Entry) -> bytes:
    """Return the length of the key, the key, and the values, aligned to 8 bytes."""
    encoded = key.encode()
    padding = b" " * (8 - (len(encoded) + _INTEGER.size) % 8)
    return _INTEGER.pack(len(encoded)) + encoded + padding + _ENTRY.pack(*entry)


def _write_all(descriptor: int, data: bytes, position: int) -> None:
    """Write at a position. Raises `OSError`, also if there was space for a part only."""
    while data:
        written = os.pwrite(descriptor, data, position)
        data = data[written:]
        position += written


values.MmapedDict = MetricFile  # type: ignore[attr-defined,assignment]
# prometheus_client chooses when it is imported, which other code may have done too early.
if "PROMETHEUS_MULTIPROC_DIR" in os.environ and not values.ValueClass._multiprocess:
    values.ValueClass = values.MultiProcessValue()  # type: ignore[no-untyped-call]
