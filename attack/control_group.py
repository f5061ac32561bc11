"""A control group of its own for a service, where this machine permits one."""

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MOUNT = Path("/sys/fs/cgroup")
#: Directories below which groups have the controller of the CPU: of v1, then of v2.
PARENTS = (MOUNT / "cpu", MOUNT / "cpu,cpuacct", MOUNT)
PERIOD_MICROSECONDS = 100_000


class ControlGroup(NamedTuple):
    """A control group without a limit."""

    directory: Path

    @property
    def prefix(self) -> tuple[str, ...]:
        """The command that moves itself into the group, and becomes the command after it."""
        script = 'echo $$ > "$0" && exec "$@"'
        return ("sh", "-c", script, str(self.directory / "cgroup.procs"))

    @contextlib.contextmanager
    def limited(self, cpus: float) -> Iterator[None]:
        """Limit the CPU of the group during the block."""
        quota = round(cpus * PERIOD_MICROSECONDS)
        file = self.directory / "cpu.max"
        limit, unlimited = (f"{quota} {PERIOD_MICROSECONDS}", "max")
        if not file.exists():
            file = self.directory / "cpu.cfs_quota_us"
            limit, unlimited = (str(quota), "-1")
        file.write_text(limit)
        try:
            yield
        finally:
            file.write_text(unlimited)


@contextlib.contextmanager
def control_group() -> Iterator[ControlGroup | None]:
    """Create a group, and remove it after the block. Yield None where that is not permitted.

    It needs root, and in a container a writable /sys/fs/cgroup.
    """
    for parent in PARENTS:
        directory = parent / f"attack-{secrets.token_hex(4)}"
        try:
            directory.mkdir()
        except OSError:
            continue
        try:
            if any((directory / name).exists() for name in ("cpu.max", "cpu.cfs_quota_us")):
                yield ControlGroup(directory)
                return
        finally:
            directory.rmdir()
    yield None
