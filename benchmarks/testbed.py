"""The testbed: a generated service, a temporary Postgres and Redis, and the bare applications."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urlsplit
from uuid import uuid4

from benchmarks import BenchError
from benchmarks.servers import Server, environment, fetch
from scripts import demo, interpreter
from scripts.ports import free_port

HERE = Path(__file__).parent
#: Connections in the service's pool by default: 8 for the pod, one of them for readiness.
POOL_SIZE = 7
PAYMENT = b'{"amount": 1250, "currency": "EUR", "reference": "order-1"}'
#: Prints the two URLs, then waits until its input is closed, so that Postgres and Redis stop
#: whenever this process ends, also after SIGKILL.
HOLD = 'printf "%s\\n%s\\n" "$DATABASE_URL" "$REDIS_URL" && cat'
SLOW_QUERIES = """
import asyncio, asyncpg, os
async def main():
    connection = await asyncpg.connect(os.environ["DATABASE_URL"])
    await connection.execute("alter table payments rename to stored_payments")
    await connection.execute(
        "create view payments as select stored_payments.* from stored_payments, pg_sleep({seconds})"
    )
    await connection.close()
asyncio.run(main())
"""
#: Prints the versions of Python and of the packages named in its arguments, as JSON.
PRINT_VERSIONS = """
import importlib.metadata, json, platform, sys
versions = {"python": platform.python_version()}
installed = {}
for distribution in importlib.metadata.distributions():
    installed[distribution.metadata["name"].lower().replace("_", "-")] = distribution.version
for name in sys.argv[1:]:
    if name in installed:
        versions[name] = installed[name]
print(json.dumps(versions))
"""
#: The packages that determine the speed.
PACKAGES = (
    "gunicorn",
    "uvicorn",
    "uvicorn-worker",
    "uvloop",
    "httptools",
    "fastapi",
    "starlette",
    "pydantic",
    "asyncpg",
    "prometheus-client",
    "prometheus-fastapi-instrumentator",
)


def python() -> str:
    """Return the interpreter of all servers: `BENCH_PYTHON`, else the latest tested one."""
    if named := os.environ.get("BENCH_PYTHON"):
        return named
    for version in ("3.13", "3.12", "3.11"):
        if found := interpreter.find(version):
            return found
    return sys.executable


@dataclass(frozen=True)
class Testbed:
    """A generated service with its dependencies."""

    directory: Path
    project: Path
    python: Path
    database: SplitResult
    redis: SplitResult

    def call(self, *command: str) -> None:
        """Run a command with the service's Python.

        Raises `BenchError` if it fails.
        """
        done = subprocess.run(
            [self.python, *command],
            cwd=self.project,
            env=environment(DATABASE_URL=self.database.geturl()),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise BenchError(f"{' '.join(command)[:80]!r} failed: {done.stderr.strip()[-300:]}")

    def run_figures(self, module: str, *arguments: str, **settings: str) -> None:
        """Run a module of apps/, which measures and prints, in the environment of the service.

        If this run is interrupted, the module is interrupted once, and stops its own servers.
        Raises `BenchError` if it fails.
        """
        with subprocess.Popen(
            [self.python, "-m", module, *arguments],
            cwd=self.project,
            env=environment(PYTHONPATH=str(self.directory / "apps"), **settings),
            # Ctrl-C must not reach it: this process interrupts it.
            start_new_session=True,
        ) as process:
            try:
                process.wait()
            except BaseException:
                process.send_signal(signal.SIGINT)
                process.wait()
                raise
        if process.returncode:
            raise BenchError(f"{module} exited with {process.returncode}; see above")

    def versions(self) -> dict[str, str]:
        """Return the versions of Python and of the packages that determine the speed."""
        return versions(self.python)

    def bare(self, app: str = "bare", path: str = "/", workers: int = 1) -> Server:
        """Return an application of `apps/` on the stock gunicorn and uvicorn worker."""
        port = free_port()
        command = [str(self.python), "-m", "gunicorn", f"{app}:app"]
        command += ["--bind", f"127.0.0.1:{port}", "--workers", str(workers)]
        command += ["--worker-class", "uvicorn_worker.UvicornWorker"]
        # The service's keep-alive; and no control socket, which is a file in the home directory.
        command += ["--keep-alive", "75", "--no-control-socket"]
        settings = {"DATABASE_URL": self.database.geturl(), "POOL_SIZE": str(POOL_SIZE)}
        name = "bare FastAPI" + (" + asyncpg" if app != "bare" else "")
        return Server(name, command, self.directory / "apps", port, path, settings)

    def service(
        self, path: str = "/", workers: int = 1, app: str = "stored", **settings: str
    ) -> Server:
        """Return the generated service as in production: JSON lines, metrics and all limits.

        `app` is one of `apps/` that adds to the service.
        """
        port = free_port()
        defaults = {
            "DATABASE_URL": self.database.geturl(),
            "REDIS_URL": self.redis.geturl(),
            "BIND": f"127.0.0.1:{port}",
            "METRICS_BIND": f"127.0.0.1:{free_port()}",
            "WEB_CONCURRENCY": str(workers),
            "LOG_FORMAT": "json",
            "PYTHONPATH": str(self.directory / "apps"),
        }
        command = [str(self.python), "-m", "gunicorn", f"{app}:app"]
        return Server(
            "the service", command, self.project, port, path, defaults | settings, signal.SIGINT
        )

    def new_payment(self) -> str:
        """Store a payment; return its path."""
        with self.service("/health/ready") as service:
            url = service.url.removesuffix(service.path) + "/payments"
            headers = {"Idempotency-Key": uuid4().hex}
            status, body = fetch(url, "POST", PAYMENT, headers)
        if status != 201:
            raise BenchError(f"POST /payments returned {status}: {body.decode()[:200]}")
        return f"/stored/{json.loads(body)['payment_id']}"

    def slow_down(self, seconds: float) -> None:
        """Delay each query of a payment from now on, as a lock or a busy disk does."""
        self.call("-c", SLOW_QUERIES.format(seconds=seconds))


def versions(python: Path) -> dict[str, str]:
    """Return the version of an interpreter and of its packages that determine the speed."""
    command = [str(python), "-c", PRINT_VERSIONS, *PACKAGES]
    done = subprocess.run(command, capture_output=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


@contextlib.contextmanager
def open_testbed(directory: Path, *answers: str) -> Iterator[Testbed]:
    """Generate and install the service, start Postgres with its tables, and Redis.

    `answers` are those that differ from the defaults, such as `include_jobs=true`.

    Takes a few seconds with a warm uv cache. Postgres and Redis stop with the block.
    """
    generate = [sys.executable, "-m", "cookiecutter", str(demo.ROOT), "--no-input"]
    generate += [
        "--default-config",
        "--output-dir",
        str(directory),
        "project_slug=my-service",
        *answers,
    ]
    subprocess.run(generate, check=True, stdout=subprocess.DEVNULL)
    project = directory / "my-service"
    demo.set_up(project, PYTHON=python())
    with start_services(directory, project, project / ".venv/bin/python") as testbed:
        yield testbed


@contextlib.contextmanager
def start_services(directory: Path, project: Path, executable: Path) -> Iterator[Testbed]:
    """Start Postgres, with the tables of a service, and Redis. Both stop with the block."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(HERE / "apps", directory / "apps", ignore=ignored)
    services = subprocess.Popen(
        [executable, "-m", "scripts.dev_environment", "sh", "-c", HOLD],
        cwd=project,
        env=environment() | {"DEV_DIRECTORY": str(directory / "dev")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert services.stdin
    assert services.stdout
    try:
        database, redis = (services.stdout.readline().decode().strip() for _ in range(2))
        if not redis:
            raise BenchError("the temporary Postgres and Redis did not start")
        testbed = Testbed(directory, project, executable, urlsplit(database), urlsplit(redis))
        testbed.call("-m", "alembic", "upgrade", "head")
        yield testbed
    finally:
        services.stdin.close()
        services.wait()
        services.stdout.close()
