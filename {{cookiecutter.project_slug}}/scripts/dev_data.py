"""The Postgres and Redis of `make dev`: their data is kept in `.dev`, or in `DEV_DIRECTORY`.

All commands that run at the same time share them, and the last one stops them. Each command holds a
shared lock meanwhile. The system releases it when the command ends, even if it is killed: then the
keeper, a process that waits for the lock, stops the servers.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil

from scripts.dev_services import Postgres, find_redis, kept_port, wait_until_listening

PROJECT = Path(__file__).resolve().parent.parent
#: Where Postgres' user can have its data, if it may not enter the project.
PUBLIC_DIRECTORY = Path(os.environ.get("TMPDIR") or "/var/tmp")  # noqa: S108 - its name is random
STOP_SECONDS = 10
#: A process that was started this long before or after its pid file is another one. Clocks jump.
START_TOLERANCE_SECONDS = 60
FAKE_REDIS = """
import sys, fakeredis
fakeredis.TcpFakeServer(("127.0.0.1", int(sys.argv[1]))).serve_forever()
"""
#: Detaches a process: it is no child of this one, and in no terminal's process group.
DETACH = 'log=$1; pid=$2; shift 2; "$@" </dev/null >"$log" 2>&1 & echo $! >"$pid"'


def directory() -> Path:
    """Return the directory of the data."""
    return Path(os.environ.get("DEV_DIRECTORY") or PROJECT / ".dev").absolute()


class KeptRedis:
    """A Redis or Valkey server on the loopback interface, with its data in a directory."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        self.directory = directory
        self.pid_file = directory / "pid"
        self.log_file = directory / "log"
        port_file = directory / "port"
        self.port = int(port_file.read_text()) if self.is_running else kept_port(directory)
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start and wait until it listens. Raises `SystemExit` if that fails."""
        detach(self._command(), self.log_file, self.pid_file)
        pid = int(self.pid_file.read_text())
        # Not `is_running`: while the program is loaded, a process has no command line.
        if not wait_until_listening(self.port, lambda: _is_alive(pid)):
            log = self.log_file.read_text(errors="replace")[-2000:]
            sys.exit(f"Redis of {self.directory} failed; `make dev-reset` deletes it:\n{log}")

    def _command(self) -> list[str]:
        program = find_redis()
        if program is None:
            return [sys.executable, "-c", FAKE_REDIS, str(self.port)]
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory)]
        # A save after a minute with a change, and at the end.
        return [program, *options, "--save", "60 1", "--appendonly", "no"]

    def stop(self) -> None:
        """Stop and wait; kill it after 10 s."""
        process = self._process()
        if process is None:
            return
        process.terminate()
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(STOP_SECONDS)
            return
        process.kill()

    @property
    def is_running(self) -> bool:
        """Whether the server runs, started by this process or another."""
        return self._process() is not None

    def _process(self) -> psutil.Process | None:
        """Return the process of the pid file, unless its pid is another process's by now."""
        try:
            port = (self.directory / "port").read_text()
            process = psutil.Process(int(self.pid_file.read_text()))
            started_before = self.pid_file.stat().st_mtime - process.create_time()
            # Redis shows one text in place of its command line: `redis-server 127.0.0.1:PORT`.
            words = " ".join(process.cmdline()).split()
            is_this = port in words or f"127.0.0.1:{port}" in words
        except (OSError, ValueError, psutil.Error):
            return None
        return process if is_this and abs(started_before) < START_TOLERANCE_SECONDS else None


def _is_alive(pid: int) -> bool:
    """Return whether a process exists and has not ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Servers:
    """The servers of a directory that one command needs."""

    def __init__(self, directory: Path, names: set[str]) -> None:
        """`names`: the settings that lack a URL, `DATABASE_URL` and `REDIS_URL`."""
        self.directory = directory
        self.names = names

    def start(self) -> dict[str, str]:
        """Start those that do not run yet; return the URL of each."""
        urls = {}
        if "DATABASE_URL" in self.names:
            postgres = open_postgres(self.directory)
            if not postgres.is_running:
                postgres.start()
            urls["DATABASE_URL"] = postgres.url
        if "REDIS_URL" in self.names:
            redis = KeptRedis(self.directory / "redis")
            if not redis.is_running:
                redis.start()
            urls["REDIS_URL"] = redis.url
        return urls


def open_postgres(directory: Path) -> Postgres:
    """Return the server of this directory. Its port stays the same while it is free."""
    home = directory / "postgres"
    if not home.exists():
        _create_home(home)
    postgres = Postgres(home.resolve(), is_kept=True)
    port_file = home / "port"
    is_running = port_file.exists() and postgres.is_running
    postgres.use_port(int(port_file.read_text()) if is_running else kept_port(home))
    return postgres


def _create_home(home: Path) -> None:
    """Create the directory of Postgres: elsewhere, with a link, if its user may not enter this."""
    home.unlink(missing_ok=True)  # a link whose target was deleted
    may_enter = os.geteuid() != 0 or all(each.stat().st_mode & 0o001 for each in home.parents)
    if may_enter:
        home.mkdir()
        return
    target = tempfile.mkdtemp(prefix=f"{PROJECT.name}-dev-", dir=PUBLIC_DIRECTORY)
    home.symlink_to(target)
    reason = f"root does not run Postgres, and no other user may enter {home.parent}"
    sys.stderr.write(f"the data of Postgres is in {target}: {reason}\n")


def stop_servers(directory: Path) -> None:
    """Stop the servers of a directory that run."""
    if (directory / "postgres").exists():
        postgres = open_postgres(directory)
        if postgres.is_running:
            postgres.stop("fast")
    if (directory / "redis").exists():
        KeptRedis(directory / "redis").stop()


@contextlib.contextmanager
def servers(names: set[str]) -> Iterator[dict[str, str]]:
    """Run the servers of these settings during the block; yield their URLs.

    Raises `SystemExit` with a line if one cannot be started.
    """
    path = directory()
    try:
        path.mkdir(parents=True, exist_ok=True)
        users = (path / "users.lock").open("a")
    except OSError as error:
        sys.exit(f"{path}: {error.strerror}; set DEV_DIRECTORY to a directory that you may write")
    with users:
        # Waits while the servers are being stopped.
        fcntl.flock(users, fcntl.LOCK_SH)
        try:
            with _start_lock(path):
                urls = Servers(path, names).start()
            _start_keeper(path)
            yield urls
        finally:
            _leave(path, users)


def _leave(path: Path, users: IO[str]) -> None:
    """Stop the servers, unless another command uses them."""
    with _start_lock(path):
        if _try_lock(users, fcntl.LOCK_EX):
            stop_servers(path)
        elif not _try_lock(users, fcntl.LOCK_SH):
            # The keeper has the lock, and is stopping them.
            fcntl.flock(users, fcntl.LOCK_SH)


@contextlib.contextmanager
def _start_lock(path: Path) -> Iterator[None]:
    """Keep other commands from starting or stopping servers during the block."""
    with (path / "start.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _try_lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def detach(command: list[str], log: Path, pid: Path) -> None:
    """Start a process that outlives this one, and gets no signal of a terminal."""
    shell = ["sh", "-c", DETACH, "sh", str(log), str(pid), *command]
    subprocess.run(shell, check=True, cwd=PROJECT, start_new_session=True)


def _start_keeper(path: Path) -> None:
    command = [sys.executable, "-m", "scripts.dev_data", "keep", str(path)]
    detach(command, path / "keeper.log", path / "keeper.pid")


def keep(path: Path) -> None:
    """Wait until no command uses the servers, and stop them. A second keeper ends at once."""
    with (path / "users.lock").open("a") as users, (path / "keeper.lock").open("a") as keeper:
        if _try_lock(keeper, fcntl.LOCK_EX):
            fcntl.flock(users, fcntl.LOCK_EX)
            stop_servers(path)


def reset(path: Path) -> None:
    """Delete the data. Raises `SystemExit` if a command uses it."""
    if not path.is_dir():
        return
    with (path / "users.lock").open("a") as users:
        if not _try_lock(users, fcntl.LOCK_EX):
            sys.exit(f"{path}: in use; stop `make dev` and the other commands that use it first")
        stop_servers(path)
        for home in (path / "postgres", path / "redis"):
            shutil.rmtree(home.resolve(), ignore_errors=True)
            home.unlink(missing_ok=True)


def main() -> None:
    """Keep or reset."""
    action, *arguments = sys.argv[1:]
    if action == "keep":
        keep(Path(arguments[0]))
    else:
        reset(directory())
        sys.stdout.write(f"the data in {directory()} is deleted\n")


if __name__ == "__main__":
    main()
