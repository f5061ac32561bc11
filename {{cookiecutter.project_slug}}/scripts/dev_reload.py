"""Auto-reload of `make dev`: the files that it watches, and the variables of `.env`."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dotenv import dotenv_values

from scripts import dev_child
from scripts.parent import Parent

POLL_SECONDS = 0.25
ENV_FILE = Path(".env")
#: Everything in it, templates included.
APP = Path("app")
MIGRATIONS = Path("migrations/versions")
#: Settings of which a running `make dev` has made use: servers and sockets.
FIXED = ("DATABASE_URL", "REDIS_URL", "SECRETS_DIR", "BIND", "PORT", "METRICS_BIND")


def migrate() -> bool:
    """Upgrade the database to the newest migration; return whether that worked."""
    command = [sys.executable, "-m", "alembic", "upgrade", "head"]
    return subprocess.run(command, check=False).returncode == 0


class WatchedFiles:
    """The files whose change restarts the server."""

    def __init__(self) -> None:
        self.times = self._read_times()

    def changed(self) -> list[Path]:
        """Return the files that have changed since the last call, new and deleted ones too."""
        times = self._read_times()
        different = dict(self.times.items() ^ times.items())
        self.times = times
        return sorted(different)

    def _read_times(self) -> dict[Path, int]:
        times = {}
        for path in (ENV_FILE, *APP.rglob("*"), *MIGRATIONS.glob("*.py")):
            if "__pycache__" not in path.parts and path.is_file():
                try:
                    times[path] = path.stat().st_mtime_ns
                except FileNotFoundError:
                    continue  # deleted just now
        return times


class EnvFile:
    """The variables of `.env`. The environment that make was called in overrides them."""

    def __init__(self) -> None:
        self.values = self._read()

    def reload(self) -> list[str]:
        """Apply a change of the file; return the settings that need a restart of `make dev`."""
        before = self.values
        self.values = self._read()
        changed = {name for name, _ in before.items() ^ self.values.items()}
        for name in changed:
            if os.environ.get(name) != before.get(name):
                continue  # set outside of the file
            if name in self.values:
                os.environ[name] = self.values[name]
            else:
                del os.environ[name]
        return sorted(changed.intersection(FIXED))

    def _read(self) -> dict[str, str]:
        if not ENV_FILE.is_file():
            return {}
        return {name: value for name, value in dotenv_values(ENV_FILE).items() if value}


class Reloader:
    """Runs the server in a child process, and again after each change of a file."""

    def __init__(
        self, listener: socket.socket, parent: Parent, is_stopped: Callable[[], bool]
    ) -> None:
        """`is_stopped`: whether a signal has asked for the end."""
        self.listener = listener
        self.is_stopped = is_stopped
        self.parent = parent
        self.files = WatchedFiles()
        self.env = EnvFile()

    def run(self) -> None:
        """Serve until the end, or until the parent of this process, such as make, is gone."""
        child = self._start()
        try:
            while self.parent.is_running and not self.is_stopped():
                changed = self.files.changed()
                if changed:
                    self._prepare(changed)
                    dev_child.stop(child)
                    child = self._start()
                time.sleep(POLL_SECONDS)
        finally:
            dev_child.stop(child)

    def _start(self) -> "subprocess.Popen[bytes]":
        descriptor = self.listener.fileno()
        return dev_child.start("scripts.dev_server", str(descriptor), pass_fds=[descriptor])

    def _prepare(self, changed: list[Path]) -> None:
        sys.stdout.write(f"changed, reloading: {', '.join(map(str, changed))}\n")
        if ENV_FILE in changed:
            names = self.env.reload()
            if names:
                sys.stdout.write(f"restart `make dev` to apply {', '.join(names)}\n")
        sys.stdout.flush()
        if any(MIGRATIONS in path.parents for path in changed):
            migrate()
