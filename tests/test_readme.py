"""The commands and the code of both READMEs work, and their links and targets exist."""

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
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from scripts.ports import eventually, free_port, is_listening
from tests.conftest import CI, QUESTIONS, ROOT, SERVICE_BIN, SOURCE, Bake, missing, tracked
from tests.parts import COMBINATIONS, Parts, bake_parts, parts_id

README = (ROOT / "README.md").read_text()
SERVICE_README = (ROOT / SOURCE / "README.md").read_text()
SHELL = re.compile(r"```sh\n(.*?)```", re.DOTALL)
BLOCKS = SHELL.findall(README)
MAKE_TARGET = re.compile(r"`make ([a-z0-9-]+)`")
BASE = "http://127.0.0.1:8000"
READY_SECONDS = 120
#: Ctrl-C skips the drain, which would take ten seconds. Alone, the service stops within two.
INTERRUPT_SECONDS = 8
#: Targets of the generated project that the template's README mentions.
PROJECT_TARGETS = {"dev", "run", "doctor", "up", "edge", "remove-example", "pattern", "remove-jobs"}


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def anchors(text: str) -> set[str]:
    """Return the anchors of the headings of a document, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", name.lower()).replace(" ", "-") for name in headings}


def test_links_within_the_service_readme_lead_to_headings() -> None:
    links = set(re.findall(r"\]\(#([^)]+)\)", SERVICE_README))
    assert links
    assert links <= anchors(SERVICE_README)


def help_lines(directory: Path) -> list[str]:
    """Return the output of `make help`, a line for each target."""
    command = ["make", "--silent", "help"]
    done = subprocess.run(command, cwd=directory, check=True, stdout=subprocess.PIPE)
    return done.stdout.decode().splitlines()


def test_make_targets_of_the_readmes_exist_and_are_explained() -> None:
    template_help = help_lines(ROOT)
    service_help = help_lines(ROOT / SOURCE)
    template_targets = {line.split()[0] for line in template_help}
    service_targets = {line.split()[0] for line in service_help}
    assert set(MAKE_TARGET.findall(README)) - PROJECT_TARGETS <= template_targets
    assert set(MAKE_TARGET.findall(SERVICE_README)) <= service_targets
    for line in template_help + service_help:
        assert len(line.split(maxsplit=1)) == 2, line


@pytest.mark.parametrize("parts", COMBINATIONS, ids=parts_id)
def test_readme_of_a_project_has_its_targets(bake: Bake, parts: Parts) -> None:
    """Each target of the Makefile, and no other one: those of a part go with it."""
    project = bake_parts(bake, parts)
    targets = {line.split()[0] for line in help_lines(project)}
    documents = [project / "README.md", *project.glob("docs/*.md")]
    texts = [path.read_text() for path in documents]
    mentioned = {name for text in texts for name in re.findall(r"`make ([a-z0-9-]+)", text)}
    of_template = {"bench", "tuning"}  # docs/tuning.md
    if "jobs" in parts:
        of_template.add("job-figures")  # docs/jobs.md
    assert mentioned - targets == of_template
    assert targets - set(re.findall(r"make ([a-z0-9-]+)", texts[0])) == set()


@pytest.mark.parametrize("parts", COMBINATIONS, ids=parts_id)
def test_links_between_the_documents_of_a_project_exist(bake: Bake, parts: Parts) -> None:
    project = bake_parts(bake, parts)
    for document in [project / "README.md", *project.glob("docs/*.md")]:
        for link in re.findall(r"\]\(([^)]+)\)", document.read_text()):
            name, _, anchor = link.partition("#")
            if "://" in name:
                continue
            target = document.parent / name if name else document
            assert target.exists(), (document.name, link)
            if anchor:
                assert anchor in anchors(target.read_text()), (document.name, link)


@pytest.mark.parametrize("parts", COMBINATIONS, ids=parts_id)
def test_each_script_of_a_project_has_a_reader(bake: Bake, parts: Parts) -> None:
    """The Makefile, another script, a test, or a document that the team follows."""
    project = bake_parts(bake, parts)
    readers = [project / "Makefile", project / ".github/workflows/ci.yml", project / "README.md"]
    readers += [*project.glob("scripts/**/*.py"), *project.glob("tests/**/*.py")]
    for path in project.glob("scripts/*.py"):
        if path.name != "__init__.py":
            used = re.compile(rf"scripts(\.|/| import [\w\s,()]*?)\b{path.stem}\b")
            others = [reader for reader in readers if reader != path]
            assert any(used.search(reader.read_text()) for reader in others), path.name


def test_help_of_the_service_is_short() -> None:
    for line in help_lines(ROOT / SOURCE):
        _, text = line.split(maxsplit=1)
        assert len(text) < 70, line


def test_readme_lists_the_questions_of_the_template() -> None:
    questions = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    assert questions == QUESTIONS


def test_no_file_mentions_the_build_machine() -> None:
    for name in tracked():
        text = (ROOT / name).read_bytes().decode(errors="replace")
        for word in ("pypi" + ".org", "python" + "hosted", "debian" + ".org", "/root" + "/"):
            assert word not in text, (name, word)


class Terminal:
    """A command in a terminal of its own: Ctrl-C reaches all its processes, output is readable."""

    def __init__(
        self, command: list[str], directory: Path, temporary: Path, **settings: str
    ) -> None:
        self.temporary = temporary
        self.master, slave = pty.openpty()
        environment = {
            name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MFLAGS"}
        }
        self.process = subprocess.Popen(
            command,
            cwd=directory,
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
        """Return the output so far."""
        with contextlib.suppress(OSError):  # no output at the moment, or the terminal is closed
            while True:
                part = os.read(self.master, 65536)
                if not part:
                    break
                self.text += part.decode(errors="replace")
        return self.text

    def wait_for(self, url: str) -> None:
        """Wait until a URL responds 200; fail if the command exits first."""

        def responds() -> bool:
            assert self.process.poll() is None, self.read()
            self.read()
            return httpx.get(url).status_code == 200

        eventually(responds, READY_SECONDS)

    def interrupt(self) -> float:
        """Send Ctrl-C to the foreground; return the seconds until the command has exited."""
        start = time.monotonic()
        os.killpg(self.process.pid, signal.SIGINT)
        while self.process.poll() is None and time.monotonic() - start < 30:
            self.read()
            time.sleep(0.02)
        return time.monotonic() - start

    def family(self) -> list[psutil.Process]:
        """Return the processes that it has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def directories(self, family: list[psutil.Process]) -> list[Path]:
        """Return the directories of its metrics."""
        found: list[Path] = []
        for process in family:
            for place in (self.temporary, Path("/dev/shm")):
                found += place.glob(f"metrics-{process.pid}-*")
        return found


@contextlib.contextmanager
def terminal(command: list[str], directory: Path = ROOT, **settings: str) -> Iterator[Terminal]:
    """Run a command in a terminal with a temporary directory of its own; stop it afterwards."""
    with tempfile.TemporaryDirectory() as temporary:
        # The user of a temporary Postgres needs access, which pytest's directories deny.
        Path(temporary).chmod(0o755)
        running = Terminal(command, directory, Path(temporary), **settings)
        try:
            yield running
        finally:
            if running.process.poll() is None:
                running.interrupt()
            os.close(running.master)


def tools() -> str:
    """Return the variable that makes a project use this repository's uv."""
    return f"TOOLS={os.environ.get('TOOLS', ROOT / '.tools')}"


@pytest.fixture(scope="module")
def demo() -> Iterator[Terminal]:
    """`make demo`, once it has printed its guide."""
    with terminal(["make", "demo", f"VENV={sys.prefix}", tools()]) as running:
        running.wait_for(BASE + "/health/ready")
        eventually(lambda: "Ctrl-C ends the demo." in running.read())
        yield running


@pytest.mark.slow
def test_demo_serves_the_requests_of_the_readme(demo: Terminal) -> None:
    (commands,) = [block for block in BLOCKS if block.startswith(f"curl -i {BASE}/\n")]
    done = subprocess.run(["bash", "-ec", commands], capture_output=True, check=True)
    responses = done.stdout.decode()
    assert re.findall(r"HTTP/1\.1 (\d+) ", responses) == ["200", "200", "201"]
    assert "http_server_request_duration_seconds_count" in responses
    for path in ("/health/live", "/health/startup"):
        assert httpx.get(BASE + path).status_code == 200
    assert '{"timestamp"' not in demo.read()  # readable lines on a terminal
    assert "'/payments' 201" in demo.read()


@pytest.mark.slow
def test_demo_settles_its_first_payment(demo: Terminal) -> None:
    """The guide reports it, and the service lists it."""
    (path,) = re.findall(
        r"GET (/payments/[0-9a-f-]{36})    settled, \d+\.\d s later\s", demo.read()
    )
    assert httpx.get(BASE + path).json()["status"] == "settled"


def development_ports(project: Path) -> list[int]:
    """Return the ports of the project's Postgres and Redis."""
    return [int((project / f".dev/{name}/port").read_text()) for name in ("postgres", "redis")]


@pytest.mark.slow
def test_ctrl_c_stops_the_demo_without_a_drain_and_leaves_nothing(demo: Terminal) -> None:
    family = demo.family()
    directories = demo.directories(family)
    assert len(directories) == 1
    servers = development_ports(ROOT / ".demo/my-service")
    assert all(map(is_listening, servers))
    assert demo.interrupt() < INTERRUPT_SECONDS
    _, alive = psutil.wait_procs(family, 10)
    assert alive == []
    assert not any(path.exists() for path in [*directories, *demo.directories(family)])
    assert not any(map(is_listening, servers))
    assert "Traceback" not in demo.text
    assert not (CI and "fakeredis" in demo.text)


@pytest.mark.slow
def test_second_demo_reports_the_port_in_use(template: Path) -> None:
    command = [sys.executable, "-m", "scripts.demo"]
    with socket.create_server(("127.0.0.1", 8000)):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("127.0.0.1:8000: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_commands_without_make_set_up_the_template(template: Path, tmp_path: Path) -> None:
    """pytest imports all tests, which needs all requirements, and runs one of the fast ones.

    The result of the others does not depend on how the environment was made.
    """
    (commands,) = [block for block in BLOCKS if block.startswith("python3 -m pip")]
    fast = "-m 'not slow'\n"
    assert commands.count(fast) == 1
    commands = commands.replace(fast, f"-k test_two_bakes_are_identical {fast}")
    copy = shutil.copytree(template, tmp_path / "copy")
    subprocess.run(["git", "init", "--quiet"], cwd=copy, check=True)
    done = subprocess.run(
        ["bash", "-ec", commands],
        cwd=copy,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    output = done.stdout.decode()
    assert done.returncode == 0, output[-5000:]
    assert re.search(r" 1 passed, \d+ deselected", output)


def addresses() -> dict[str, str]:
    """Return settings with free addresses for a service."""
    return {"BIND": f"127.0.0.1:{free_port()}", "METRICS_BIND": f"127.0.0.1:{free_port()}"}


def shell_block(project: Path, word: str) -> str:
    """Return the only shell block with this word of the project's README."""
    text = (project / "README.md").read_text()
    blocks: list[str] = SHELL.findall(text)
    (found,) = [block for block in blocks if word in block]
    return found


@pytest.mark.slow
def test_commands_without_make_run_the_project(bake: Bake) -> None:
    project = bake()
    free = addresses()
    commands = shell_block(project, "pip install")
    with terminal(["bash", "-ec", commands], project, **free) as running:
        running.wait_for(f"http://{free['BIND']}/health/ready")
        assert running.interrupt() < INTERRUPT_SECONDS


@pytest.mark.slow
def test_make_dev_reloads_and_serves_docs_and_metrics(bake: Bake) -> None:
    """It reads `.env`, too."""
    project = bake()
    free = addresses()
    (project / ".env").write_text('SERVICE_VERSION="1.2.3 from .env"\n')
    base = f"http://{free['BIND']}"
    metrics = f"http://{free['METRICS_BIND']}/metrics"
    with terminal(["make", "dev", tools()], project, **free) as running:
        running.wait_for(base + "/health/ready")
        expected = {"service": "my-service", "version": "1.2.3 from .env"}
        assert httpx.get(base + "/").json() == expected
        assert httpx.get(base + "/docs").status_code == 200
        assert "http_server_request_duration_seconds_count" in httpx.get(metrics).text
        main = project / "app/main.py"
        main.write_text(main.read_text().replace('"service": settings', '"renamed": settings'))
        eventually(lambda: "renamed" in httpx.get(base + "/").json(), READY_SECONDS)
        assert "GET '/docs' 200" in running.read()
        assert running.interrupt() < INTERRUPT_SECONDS
        assert "Traceback" not in running.text


@pytest.mark.slow
def test_payments_session_can_be_pasted(bake: Bake) -> None:
    project = bake()
    free = addresses()
    session = shell_block(project, "Idempotency-Key")
    session = session.replace("127.0.0.1:8000", free["BIND"])
    session = session.replace("127.0.0.1:9464", free["METRICS_BIND"])
    base = f"http://{free['BIND']}"
    with terminal(["make", "dev", tools()], project, **free) as running:
        running.wait_for(base + "/health/ready")
        command = ["bash", "-ec", session]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        output = done.stdout.lower()
        first, second = re.findall(r"http/1.1 201 created.*?(\{.*?\})", output, re.DOTALL)
        assert first == second
        assert output.count("idempotent-replayed: true") == 1
        assert "http/1.1 200 ok" in output
        assert "http_server_request_duration_seconds_count" in output
        eventually(lambda: "settled" in httpx.get(f"{base}/payments").text, READY_SECONDS)
        running.interrupt()


@pytest.mark.slow
def test_payments_with_a_token_can_be_pasted(bake: Bake) -> None:
    """`make dev AUTH=1` rejects a request without a token, and one without the scope."""
    project = bake()
    free = addresses()
    line = shell_block(project, "make -s token").replace("127.0.0.1:8000", free["BIND"])
    base = f"http://{free['BIND']}"
    name, value = tools().split("=", 1)
    with terminal(["make", "dev", "AUTH=1", tools()], project, **free) as running:
        running.wait_for(base + "/health/ready")
        assert httpx.get(base + "/payments").status_code == 401
        for commands, status in ((line, 200), (line.replace("payments:read", "other"), 403)):
            done = subprocess.run(
                ["bash", "-ec", commands],
                cwd=project,
                env=os.environ | {name: value},
                capture_output=True,
                text=True,
                check=True,
            )
            assert done.stdout.startswith(f"HTTP/1.1 {status} "), done.stdout + done.stderr
        running.interrupt()
        assert "Traceback" not in running.text


@contextlib.contextmanager
def broker(project: Path, dispatcher: str) -> Iterator[dict[str, str]]:
    """Run `make rabbitmq` for the dispatcher RabbitMQ; yield the variable that it prints."""
    if dispatcher == "Postgres":
        yield {}
        return
    if not shutil.which("rabbitmq-server"):
        missing("rabbitmq-server")
    line = re.compile(r"^AMQP_URL=(\S+)\s", re.MULTILINE)
    with terminal(["make", "--silent", "rabbitmq", tools()], project) as running:
        eventually(lambda: line.search(running.read()), READY_SECONDS)
        yield {"AMQP_URL": line.findall(running.text)[0]}
        running.interrupt()


@pytest.mark.slow
@pytest.mark.parametrize("dispatcher", ["Postgres", "RabbitMQ"])
def test_job_session_can_be_pasted(bake: Bake, dispatcher: str) -> None:
    """A job succeeds within the two seconds of its `sleep`, under `make dev`."""
    project = bake(include_jobs=True)
    free = addresses()
    session = shell_block(project, "/conversations").replace("127.0.0.1:8000", free["BIND"])
    with (
        broker(project, dispatcher) as url,
        terminal(["make", "dev", tools()], project, **free, **url) as running,
    ):
        running.wait_for(f"http://{free['BIND']}/health/ready")
        eventually(lambda: f"jobs, which {dispatcher} hands out" in running.read())
        (metrics,) = re.findall(r"its metrics +curl (http://127\S+)/metrics", running.text)[-1:]
        running.wait_for(f"{metrics}/health/ready")
        command = ["bash", "-ec", session]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        _, last = re.findall(r"HTTP/1.1 200 OK.*?(\{.*?\}+)", done.stdout, re.DOTALL)
        assert '"status":"succeeded"' in last
        assert '"result":{"score":50}' in last
        assert '"score":50' in done.stdout.splitlines()[-1]
        running.interrupt()
        assert "Traceback" not in running.text


@pytest.mark.slow
def test_make_run_checks_the_settings_before_gunicorn(bake: Bake) -> None:
    environment = os.environ | {"WEB_CONCURRENCY": "two"}
    for target in ("run", "doctor"):
        command = ["make", "--silent", target, tools()]
        done = subprocess.run(
            command, cwd=bake(target), env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode != 0
        assert "configuration error: WEB_CONCURRENCY=two: " in done.stderr
        assert "Traceback" not in done.stderr


class Guide:
    """A section of the project's README, followed in the project by the text of its steps."""

    def __init__(self, project: Path, heading: str) -> None:
        self.project = project
        text = (project / "README.md").read_text()
        (self.text,) = re.findall(rf"^## {heading}\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)

    def blocks(self, language: str) -> list[tuple[str, str]]:
        """Return the code blocks of a language, each with the paragraph above it."""
        pattern = rf"((?:[^\n]+\n)+)\n *```{language}\n(.*?)\n *```"
        found = re.findall(pattern, self.text, re.DOTALL)
        return [(paragraph, textwrap.dedent(code) + "\n") for paragraph, code in found]

    def run(self, program: str, *arguments: str) -> None:
        """Run a program of the service's environment; fail with its output."""
        command = [str(SERVICE_BIN / program), *arguments]
        done = subprocess.run(
            command, cwd=self.project, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def edit(self, name: str, before: str, after: str) -> None:
        """Replace a text that a file of the project contains once."""
        path = self.project / name
        text = path.read_text()
        assert text.count(before) == 1, (name, before)
        path.write_text(text.replace(before, after))


@pytest.mark.slow
def test_changed_timeout_of_the_readme_passes_the_checks(bake: Bake) -> None:
    """The example of "Change a timeout": requests may last 60 s."""
    project = bake()
    guide = Guide(project, "Change a timeout")
    changed = ("REQUEST_TIMEOUT_SECONDS", "GRACEFUL_TIMEOUT_SECONDS", "TERMINATION_GRACE_SECONDS")
    values = {"REQUEST_TIMEOUT_SECONDS": "60"}
    values |= dict(re.findall(r"`([A-Z_]+_SECONDS)=(\d+)`", guide.text))
    assert set(values) == set(changed)
    (grace,) = re.findall(r"`(terminationGracePeriodSeconds: \d+)`", guide.text)
    (stop,) = re.findall(r"`(stop_grace_period: \d+s)`", guide.text)
    (read,) = re.findall(r"`(proxy_read_timeout \d+s;)`", guide.text)
    (route,) = re.findall(r"`(request: \d+s)`", guide.text)

    literals = "".join(f"\n      - {name}={value}" for name, value in values.items())
    base = "deploy/k8s/base/kustomization.yaml"
    guide.edit(base, "\n      - TERMINATION_GRACE_SECONDS=60", literals)
    environment = "".join(f"\n      {name}: {value}" for name, value in values.items())
    guide.edit(
        "compose.yaml", "\n      ENVIRONMENT: staging", "\n      ENVIRONMENT: staging" + environment
    )
    for name in ("base/deployment.yaml", "components/consumer/deployment.yaml"):
        guide.edit(f"deploy/k8s/{name}", "terminationGracePeriodSeconds: 60", grace)
    compose = project / "compose.yaml"
    compose.write_text(compose.read_text().replace("stop_grace_period: 60s", stop))
    guide.edit("deploy/compose/nginx.conf", "proxy_read_timeout 35s;", read)
    guide.edit("deploy/k8s/components/httproute/httproute.yaml", "request: 35s", route)

    guide.run("python", "-m", "pytest", "-q", "tests/deploy/test_deploy.py")
    arguments = ["--cpus", "1", "--memory-mb", "256"]
    done = subprocess.run(
        [str(SERVICE_BIN / "python"), "-m", "app.sizing", *arguments],
        cwd=project,
        env=os.environ | values | {"AUTH_DISABLED": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
