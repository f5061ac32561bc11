"""What the README says can be done is done."""

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
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import CI, ROOT, SOURCE, Bake, tracked
from tests.containers import eventually

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
BASE = "http://127.0.0.1:8000"
READY_SECONDS = 120
#: Ctrl-C lets nobody drain, which would take ten seconds; alone, what it ends has ended within two.
INTERRUPT_SECONDS = 8


def test_every_linked_file_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


#: What the template's README says of the targets of the generated project.
OF_THE_PROJECT = {"dev", "run", "doctor", "up", "edge", "remove-example"}


def test_every_make_target_is_explained_and_exists() -> None:
    help_text = subprocess.run(
        ["make", "--silent", "help"], cwd=ROOT, check=True, stdout=subprocess.PIPE
    ).stdout.decode()
    targets = {line.split()[0] for line in help_text.splitlines()}
    assert set(re.findall(r"`make ([a-z0-9-]+)`", README)) - OF_THE_PROJECT <= targets
    project = subprocess.run(
        ["make", "--silent", "help"], cwd=ROOT / SOURCE, check=True, stdout=subprocess.PIPE
    )
    own = {line.split()[0] for line in project.stdout.decode().splitlines()}
    text = (ROOT / SOURCE / "README.md").read_text()
    assert set(re.findall(r"`make ([a-z0-9-]+)`", text)) <= own
    assert all(
        len(line.split(maxsplit=1)) == 2
        for line in (help_text + project.stdout.decode()).splitlines()
    )


def test_the_questions_of_the_readme_are_those_of_the_template() -> None:
    questions = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    assert questions == ["project_name", "project_slug", "description", "owner", "include_example"]


def test_nothing_speaks_of_the_machine_it_was_made_on() -> None:
    for name in tracked():
        text = (ROOT / name).read_bytes().decode(errors="replace")
        for word in ("pypi" + ".org", "python" + "hosted", "debian" + ".org", "/root" + "/"):
            assert word not in text, (name, word)


class Terminal:
    """A command in a terminal of its own: Ctrl-C reaches all of its processes, and output is for people."""

    def __init__(self, command: list[str], folder: Path, temporary: Path, **settings: str) -> None:
        self.temporary = temporary
        self.master, slave = pty.openpty()
        environment = {
            name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MFLAGS"}
        }
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment | {"TMPDIR": str(temporary)} | settings,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        os.set_blocking(self.master, False)
        self.text = ""

    def read(self) -> str:
        """Return all that was printed so far."""
        try:
            while part := os.read(self.master, 65536):
                self.text += part.decode(errors="replace")
        except OSError:  # nothing more for now, or the end
            pass
        return self.text

    def wait_for(self, url: str) -> None:
        """Wait until an address answers 200; fail if the command ends before."""
        end = time.monotonic() + READY_SECONDS
        while True:
            assert self.process.poll() is None, self.read()
            assert time.monotonic() < end, self.read()
            try:
                if httpx.get(url).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            self.read()
            time.sleep(0.1)

    def interrupt(self) -> float:
        """Send what Ctrl-C sends, to all in the foreground; return the seconds until the command has ended."""
        start = time.monotonic()
        os.killpg(self.process.pid, signal.SIGINT)
        while self.process.poll() is None and time.monotonic() - start < 30:
            self.read()
            time.sleep(0.02)
        return time.monotonic() - start

    def family(self) -> list[psutil.Process]:
        """Return the processes that it has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def folders(self, family: list[psutil.Process]) -> list[Path]:
        """Return the folders of its throw-away Postgres and of its metrics."""
        metrics = [f"metrics-{process.pid}-*" for process in family]
        both = [
            path
            for place in (self.temporary, Path("/dev/shm"))
            for name in metrics
            for path in place.glob(name)
        ]
        return [*self.temporary.glob("postgres-*"), *both]


@contextlib.contextmanager
def terminal(command: list[str], folder: Path = ROOT, **settings: str) -> Iterator[Terminal]:
    """Run a command in a terminal, with a temporary folder of its own, and end it, whatever happens."""
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary).chmod(
            0o755
        )  # for the user of a throw-away Postgres, whom pytest's folders keep out
        running = Terminal(command, folder, Path(temporary), **settings)
        try:
            yield running
        finally:
            if running.process.poll() is None:
                running.interrupt()
            os.close(running.master)


@pytest.fixture(scope="module")
def demo() -> Iterator[Terminal]:
    """`make demo`, as far as its guide."""
    tools = os.environ.get("TOOLS", ROOT / ".tools")
    with terminal(["make", "demo", f"VENV={sys.prefix}", f"TOOLS={tools}"]) as running:
        running.wait_for(BASE + "/health/ready")
        eventually(lambda: "Ctrl-C ends the demo." in running.read())
        yield running


@pytest.mark.slow
def test_the_demo_answers_what_the_readme_asks(demo: Terminal) -> None:
    (asked,) = [block for block in BLOCKS if block.startswith("curl -i http://127.0.0.1:8000/\n")]
    answers = subprocess.run(
        ["bash", "-ec", asked], capture_output=True, check=True
    ).stdout.decode()
    assert re.findall(r"HTTP/1\.1 (\d+) ", answers) == ["200", "200", "201"]
    assert "http_server_request_duration_seconds_count" in answers
    for path in ("/health/live", "/health/startup"):
        assert httpx.get(BASE + path).status_code == 200
    assert '{"timestamp"' not in demo.read()  # readable lines on a terminal
    assert "'/payments' 201" in demo.read()


@pytest.mark.slow
def test_ctrl_c_ends_the_demo_without_a_drain_and_leaves_nothing(demo: Terminal) -> None:
    family = demo.family()
    folders = demo.folders(family)
    assert len(folders) == 2  # its Postgres and its metrics
    assert demo.interrupt() < INTERRUPT_SECONDS
    _, alive = psutil.wait_procs(family, 10)
    assert alive == []
    assert not any(path.exists() for path in [*folders, *demo.folders(family)])
    assert "Traceback" not in demo.text
    assert not (CI and "fakeredis" in demo.text)


@pytest.mark.slow
def test_a_second_demo_says_what_is_in_its_way(template: Path) -> None:
    with socket.create_server(("127.0.0.1", 8000)):
        done = subprocess.run(
            [sys.executable, "-m", "scripts.demo"], cwd=ROOT, capture_output=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == b"127.0.0.1:8000: somebody listens there already; end that first\n"


@pytest.mark.slow
def test_the_commands_without_make_set_the_template_up(template: Path, tmp_path: Path) -> None:
    (commands,) = [block for block in BLOCKS if block.startswith("python3 -m pip")]
    copy = shutil.copytree(template, tmp_path / "copy")
    subprocess.run(["git", "init", "--quiet"], cwd=copy, check=True)
    done = subprocess.run(
        ["bash", "-ec", commands],
        cwd=copy,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout.decode()[-5000:]


def addresses() -> dict[str, str]:
    """Return free addresses for a service."""
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            ports.append(probe.getsockname()[1])
    return {"BIND": f"127.0.0.1:{ports[0]}", "METRICS_BIND": f"127.0.0.1:{ports[1]}"}


@pytest.mark.slow
def test_the_projects_commands_without_make_run_it(bake: Bake) -> None:
    project, free = bake(), addresses()
    text = (project / "README.md").read_text()
    (commands,) = [
        block for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if "pip install" in block
    ]
    with terminal(["bash", "-ec", commands], project, **free) as running:
        running.wait_for(f"http://{free['BIND']}/health/ready")
        assert running.interrupt() < INTERRUPT_SECONDS


@pytest.mark.slow
def test_make_dev_reloads_serves_docs_and_metrics_and_reads_dot_env(bake: Bake) -> None:
    project, free = bake(), addresses()
    (project / ".env").write_text('SERVICE_VERSION="1.2.3 from .env"\n')
    base = f"http://{free['BIND']}"
    tools = f"TOOLS={os.environ.get('TOOLS', ROOT / '.tools')}"
    with terminal(["make", "dev", tools], project, **free) as running:
        running.wait_for(base + "/health/ready")
        assert httpx.get(base + "/").json() == {
            "service": "my-service",
            "version": "1.2.3 from .env",
        }
        assert httpx.get(base + "/docs").status_code == 200
        assert (
            "http_server_request_duration_seconds_count"
            in httpx.get(f"http://{free['METRICS_BIND']}/metrics").text
        )
        main = project / "app/main.py"
        main.write_text(main.read_text().replace('"service": settings', '"renamed": settings'))
        eventually(lambda: "renamed" in httpx.get(base + "/").json(), READY_SECONDS)
        assert "GET '/docs' 200" in running.read()
        assert running.interrupt() < INTERRUPT_SECONDS
        assert "Traceback" not in running.text


@pytest.mark.slow
def test_the_session_with_payments_can_be_pasted(bake: Bake) -> None:
    project, free = bake(), addresses()
    text = (project / "README.md").read_text()
    (session,) = [
        block
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        if "Idempotency-Key" in block
    ]
    session = session.replace("127.0.0.1:8000", free["BIND"]).replace(
        "127.0.0.1:9464", free["METRICS_BIND"]
    )
    tools = f"TOOLS={os.environ.get('TOOLS', ROOT / '.tools')}"
    with terminal(["make", "dev", tools], project, **free) as running:
        running.wait_for(f"http://{free['BIND']}/health/ready")
        printed = subprocess.run(
            ["bash", "-ec", session], capture_output=True, text=True, check=True
        ).stdout.lower()
        first, second = re.findall(r"http/1.1 201 created.*?(\{.*?\})", printed, re.DOTALL)
        assert first == second
        assert printed.count("idempotent-replayed: true") == 1
        assert "http/1.1 200 ok" in printed
        assert "http_server_request_duration_seconds_count" in printed
        eventually(
            lambda: "settled" in httpx.get(f"http://{free['BIND']}/payments").text, READY_SECONDS
        )
        running.interrupt()


@pytest.mark.slow
def test_make_run_checks_the_settings_before_gunicorn_does(bake: Bake) -> None:
    tools = f"TOOLS={os.environ.get('TOOLS', ROOT / '.tools')}"
    environment = os.environ | {"WEB_CONCURRENCY": "two"}
    for target in ("run", "doctor"):
        command = ["make", "--silent", target, tools]
        done = subprocess.run(
            command, cwd=bake(target), env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode != 0
        assert "configuration error: WEB_CONCURRENCY=two: " in done.stderr
        assert "Traceback" not in done.stderr
