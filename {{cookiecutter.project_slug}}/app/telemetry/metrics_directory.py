"""The directory of the metrics files: made before the application is imported, owned by one master.

Nothing here imports prometheus_client, which chooses between files and memory at its import.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from app.settings import fail

#: The name that prometheus_client reads, at its import and for each file that it makes.
VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
#: A directory in memory: neither the heartbeat nor the metrics wait for a disk.
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
_PRIVATE_NAME = re.compile(r"metrics-\d+-[0-9a-f]{16}")
_FULL = (errno.ENOSPC, errno.EDQUOT)

logger = logging.getLogger("app.metrics")


class MetricsDirectory:
    """A directory that this process has claimed, until `release`."""

    def __init__(self, path: Path, owner: IO[str] | None, *, is_private: bool) -> None:
        """`owner`: the lock, or None if there is no directory, and the metrics are in memory."""
        self.path = path
        self.owner = owner
        self.is_private = is_private
        self.pid = os.getpid()

    def release(self) -> None:
        """Delete a private directory, let others claim a configured one. Children do nothing."""
        if os.getpid() != self.pid or self.owner is None:
            return
        if self.is_private:
            shutil.rmtree(self.path, ignore_errors=True)
        self.owner.close()


def claim(configured: Path | None) -> MetricsDirectory:
    """Claim the configured directory, or a new private one, and pass it to prometheus_client.

    A full file system costs the metrics, not the start. Raises `SystemExit` with one line that
    identifies the setting, if the configured directory cannot be used.
    """
    remove_abandoned()
    directory = _claim_configured(configured) if configured else _claim_private()
    os.environ[VARIABLE] = str(directory.path)
    return directory


def memory_directory() -> Path | None:
    """Return a writable directory in memory, if there is one."""
    return SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None


def remove_abandoned() -> None:
    """Delete the private directories of killed masters. Their owner's lock is free."""
    for parent in _parents():
        for directory in parent.glob("metrics-*"):
            if _PRIVATE_NAME.fullmatch(directory.name):
                # Another user's, one in use, or one that another process deletes now
                with contextlib.suppress(OSError):
                    _remove_if_free(directory)


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


def _claim_configured(path: Path) -> MetricsDirectory:
    try:
        return MetricsDirectory(path, claim_directory(path), is_private=False)
    except BlockingIOError:
        fail(VARIABLE, path, "another instance uses it; set another directory")
    except OSError as error:
        if error.errno not in _FULL:
            fail(VARIABLE, path, f"{error.strerror}; set another directory")
        logger.warning("metrics are incomplete: cannot claim %s: %s", path, error.strerror)
        return MetricsDirectory(path, None, is_private=False)


def _claim_private() -> MetricsDirectory:
    name = f"metrics-{os.getpid()}-{secrets.token_hex(8)}"
    reason = "no temporary directory"
    for parent in _parents():
        path = parent / name
        # It has its name when it is locked, or another start could delete it in between.
        unnamed = parent / f".{name}"
        try:
            owner = claim_directory(unnamed)
            unnamed.rename(path)
        except OSError as error:
            reason = f"{parent}: {error.strerror}"
            continue
        return MetricsDirectory(path, owner, is_private=True)
    logger.warning("metrics are incomplete: cannot create a directory in %s", reason)
    return MetricsDirectory(Path("/nonexistent", name), None, is_private=True)


def _parents() -> Iterator[Path]:
    """Yield the directories in which a private one may be, best first."""
    memory = memory_directory()
    if memory:
        yield memory
    # No directory is writable.
    with contextlib.suppress(FileNotFoundError):
        yield Path(tempfile.gettempdir())


def _remove_if_free(directory: Path) -> None:
    """Delete a directory of this user. Raises `OSError` if its owner is running."""
    if directory.lstat().st_uid != os.geteuid():
        return
    with (directory / ".owner").open("r+") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory)
