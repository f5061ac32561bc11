"""`make dev` in a terminal: addresses, reload, breakpoints, and an end that leaves nothing."""

import contextlib
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from app.telemetry import metrics_directory
from scripts import addresses, dev_server
from scripts.dev import Signals, serving_metrics
from scripts.dev_services import free_port
from tests.scripts.test_dev_data import processes
from tests.service_process import PROJECT, eventually

COPIED = ("app", "migrations", "scripts", "alembic.ini")
MIGRATION = '''"""Planted."""

from alembic import op

revision = "planted"
down_revision = {down_revision!r}


def upgrade() -> None:
    op.execute("create table planted (number int)")
'''
#: A route that stops at a breakpoint, for longer than a request may last.
ROUTE = """
    @app.get("/stop")
    async def stop() -> str:
        breakpoint()
        return "went on"

"""
TIMEOUT_SECONDS = 1


class Dev:
    """`python -m scripts.dev` in a terminal of its own, in a copy of the project."""

    def __init__(self, directory: Path, *arguments: str, **settings: str) -> None:
        self.directory = directory
        self.data = directory / ".dev"
        self.master, slave = pty.openpty()
        # The copy does not count in the coverage of the project.
        inherited = {name: value for name, value in os.environ.items() if "COVERAGE" not in name}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scripts.dev", *arguments],
            cwd=directory,
            env=inherited | {"PYTHONDONTWRITEBYTECODE": "1"} | settings,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        os.set_blocking(self.master, False)
        self.output = ""

    @property
    def text(self) -> str:
        """The output so far."""
        with contextlib.suppress(OSError):  # no output at the moment
            while part := os.read(self.master, 65_536):
                self.output += part.decode(errors="replace").replace("\r\n", "\n")
        return self.output

    def write(self, text: str) -> None:
        """Type a text."""
        os.write(self.master, text.encode())

    def address(self, name: str) -> str:
        """Return an address of the block that it prints."""
        pattern = re.compile(rf"^  {name} +(\S+)\s", re.MULTILINE)
        eventually(lambda: pattern.search(self.text) or self.ended)
        found = pattern.search(self.text)
        assert found, self.text
        return found[1]

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self.process.poll() is not None

    def wait_until_ready(self) -> str:
        """Wait until the service is ready; return its URL."""
        url = self.address("service")
        eventually(lambda: httpx.get(f"{url}health/ready").status_code == 200)
        return url

    def family(self) -> list[psutil.Process]:
        """Return it, its children and its servers."""
        itself = psutil.Process(self.process.pid)
        return [itself, *itself.children(recursive=True), *processes(self.data)]

    def close(self) -> None:
        """End it if it is running."""
        if not self.ended:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(30)
        os.close(self.master)


@contextlib.contextmanager
def copied() -> Iterator[Path]:
    """A copy of the project in a directory that Postgres' user may enter."""
    with tempfile.TemporaryDirectory(prefix="dev-", dir="/tmp") as name:
        directory = Path(name) / "my service"
        directory.mkdir()
        directory.parent.chmod(0o755)
        for each in COPIED:
            path = PROJECT / each
            target = directory / each
            if path.is_dir():
                shutil.copytree(path, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, target)
        yield directory


def insert(path: Path, before: str, text: str) -> None:
    content = path.read_text()
    assert content.count(before) == 1
    path.write_text(content.replace(before, text + before))


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with copied() as directory:
        yield directory


@pytest.fixture(scope="module")
def dev(directory: Path) -> Iterator[Dev]:
    """The service, whose ports are in use by another program."""
    with (
        socket.create_server(("127.0.0.1", 0)) as first,
        socket.create_server(("127.0.0.1", 0)) as second,
    ):
        bind, metrics = (f"127.0.0.1:{each.getsockname()[1]}" for each in (first, second))
        settings = {"BIND": bind, "METRICS_BIND": metrics, "TRACE": "1"}
        running = Dev(
            directory, **settings, REQUEST_TIMEOUT_SECONDS=str(TIMEOUT_SECONDS), LOG_FORMAT="json"
        )
        try:
            running.wait_until_ready()
            yield running
        finally:
            running.close()


def test_block_shows_addresses_that_respond(dev: Dev) -> None:
    assert dev.address("docs").startswith(dev.address("service"))
    for name in ("service", "docs", "metrics"):
        assert httpx.get(dev.address(name)).status_code == 200
    variables = {"DATABASE_URL": dev.address("database"), "REDIS_URL": dev.address("redis")}
    command = [sys.executable, "-m", "scripts.psql", "--tuples-only", "--no-align"]
    done = subprocess.run(
        command,
        cwd=dev.directory,
        env=os.environ | variables,
        input="select 1",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "1\n"


def test_next_free_ports_are_reported_in_a_line(dev: Dev) -> None:
    pattern = re.compile(r"^127\.0\.0\.1:\d+ is in use: (\w+) is 127", re.MULTILINE)
    lines = pattern.findall(dev.text)
    # Another run of these tests may have the port of traces.
    assert lines[:2] == ["BIND", "METRICS_BIND"]


def test_trace_of_a_request_is_on_the_page(dev: Dev) -> None:
    httpx.get(f"{dev.address('service')}?traced")

    def names() -> list[str]:
        traces = httpx.get(f"{dev.address('traces')}traces").json()
        return [spans[0]["name"] for spans in traces]

    eventually(lambda: "GET /" in names())


def test_changes_of_code_env_and_templates_reload(dev: Dev) -> None:
    url = dev.address("service")
    (dev.directory / ".env").write_text("SERVICE_VERSION=from-env\nMETRICS_BIND=127.0.0.1:1\n")
    eventually(lambda: httpx.get(url).json().get("version") == "from-env")
    assert "restart `make dev` to apply METRICS_BIND\n" in dev.text
    main = dev.directory / "app/main.py"
    main.write_text(main.read_text().replace('"version": settings', '"renamed": settings'))
    eventually(lambda: "renamed" in httpx.get(url).json())
    template = dev.directory / "app/page.html"
    template.write_text("new")
    eventually(lambda: "changed, reloading: app/page.html\n" in dev.text)
    (dev.directory / ".env").unlink()
    eventually(lambda: "changed, reloading: .env\n" in dev.text.partition("page.html")[2])
    eventually(lambda: httpx.get(url).json().get("renamed") == "0.0.0")


def test_new_migration_is_applied(dev: Dev) -> None:
    revisions = sorted((dev.directory / "migrations/versions").glob("*.py"))
    newest = revisions[-1].stem if revisions else None
    planted = dev.directory / "migrations/versions/planted.py"
    planted.write_text(MIGRATION.format(down_revision=newest))
    eventually(lambda: "-> planted" in dev.text)


def test_broken_code_is_reported_and_its_fix_reloads(dev: Dev) -> None:
    url = dev.address("service")
    main = dev.directory / "app/main.py"
    text = main.read_text()
    main.write_text("this is no code")
    eventually(lambda: "SyntaxError" in dev.text)
    main.write_text(text)
    eventually(lambda: httpx.get(url).status_code == 200)


def test_request_at_a_breakpoint_has_no_time_limit(dev: Dev) -> None:
    url = dev.address("service")
    insert(dev.directory / "app/main.py", "    app.include_router(health.router)", ROUTE)
    eventually(lambda: httpx.get(f"{url}openapi.json").text.count('"/stop"') == 1)
    client = httpx.Client(timeout=60)
    with client, client.stream("GET", url) as _:
        pass
    with subprocess.Popen(
        [sys.executable, "-c", f"import httpx; print(httpx.get({url + 'stop'!r}, timeout=60))"],
        stdout=subprocess.PIPE,
    ) as request:
        eventually(lambda: "(Pdb)" in dev.text)
        with pytest.raises(subprocess.TimeoutExpired):
            request.wait(TIMEOUT_SECONDS + 1)
        dev.write("print(40 + 2)\ncontinue\n")
        output, _ = request.communicate(timeout=30)
    assert b"200" in output
    assert "\n42\n" in dev.text


def test_ctrl_c_at_a_breakpoint_ends_everything(dev: Dev) -> None:
    """The second Ctrl-C, of an impatient developer, changes nothing."""
    url = dev.address("service")
    family = dev.family()
    with subprocess.Popen(
        [sys.executable, "-c", f"import httpx; httpx.get({url + 'stop'!r}, timeout=60)"],
        stderr=subprocess.DEVNULL,
    ):
        eventually(lambda: dev.text.count("(Pdb)") == 3)
        for _ in range(2):
            os.killpg(dev.process.pid, signal.SIGINT)
        eventually(lambda: dev.ended)
    assert dev.process.returncode == 0
    _, alive = psutil.wait_procs(family, 10)
    assert alive == []


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
def test_stop_button_and_closed_terminal_end_everything(directory: Path, number: int) -> None:
    """SIGKILL reaches this process alone, as from an editor; SIGHUP all of the terminal."""
    free = {name: f"127.0.0.1:{free_port()}" for name in ("BIND", "METRICS_BIND")}
    dev = Dev(directory, **free)
    try:
        dev.wait_until_ready()
        family = dev.family()
        if number == signal.SIGKILL:
            dev.process.kill()
        else:
            os.killpg(dev.process.pid, number)
        eventually(lambda: dev.text is not None and dev.ended)
        _, alive = psutil.wait_procs(family, 15)
        assert alive == []
    finally:
        dev.close()


def test_run_reports_a_port_in_use_before_it_starts_anything() -> None:
    """`make run` runs it first."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        bind = f"127.0.0.1:{server.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-m", "scripts.addresses"],
            cwd=PROJECT,
            env=os.environ | {"BIND": bind},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    problem = "Address already in use; stop the process that listens there, or set BIND"
    assert done.stderr == f"BIND={bind}: {problem} to another address\n"


@pytest.fixture
def signals() -> Iterator[Signals]:
    before = {number: signal.getsignal(number) for number in Signals.NUMBERS}
    try:
        yield Signals()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", Signals.NUMBERS)
def test_signal_before_uvicorn_handles_it_ends_the_command(
    signals: Signals, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Without reload. A second one does not interrupt the end."""

    def serve(_: socket.socket) -> None:
        signal.raise_signal(number)
        pytest.fail("it serves")

    monkeypatch.setattr(dev_server, "serve", serve)
    with socket.socket() as listener:
        with pytest.raises(SystemExit) as end:
            signals.serve(listener)
        signal.raise_signal(number)
        signals.serve(listener)
    assert end.value.code == 0


def test_metrics_without_a_free_port_leave_no_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(metrics_directory.VARIABLE, "")

    def fail(*_: str) -> str:
        sys.exit("no port is free")

    monkeypatch.setattr(addresses, "free_address", fail)
    with pytest.raises(SystemExit), serving_metrics():
        pytest.fail("it serves")
    assert not Path(os.environ[metrics_directory.VARIABLE]).exists()
