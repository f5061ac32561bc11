"""Where the servers live: a baked service with its environment, a throw-away Postgres and Redis, and the bare apps."""

import contextlib
import json
import os
import shutil
import signal
import socket
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

HERE = Path(__file__).parent
#: Connections of the service's pool by default: 8 for the pod, of which one is readiness'.
POOL_SIZE = 7
PAYMENT = b'{"amount": 1250, "currency": "EUR", "reference": "order-1"}'
#: Hands the addresses on and waits for the end of its input, so that the servers end with us, however we end.
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


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def python() -> str:
    """Return the interpreter of all servers: `BENCH_PYTHON`, else the newest that the service is tested with."""
    if named := os.environ.get("BENCH_PYTHON"):
        return named
    return next(filter(None, map(interpreter.find, ("3.13", "3.12", "3.11"))), sys.executable)


@dataclass(frozen=True)
class Site:
    """A baked service and what it needs."""

    folder: Path
    project: Path
    python: Path
    database: SplitResult
    redis: SplitResult

    def call(self, *command: str) -> None:
        """Run the service's Python with a command; raises `BenchError` if that fails."""
        settings = environment(DATABASE_URL=self.database.geturl())
        done = subprocess.run(
            [self.python, *command],
            cwd=self.project,
            env=settings,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise BenchError(f"{' '.join(command)[:80]!r} failed: {done.stderr.strip()[-300:]}")

    def versions(self) -> dict[str, str]:
        """Return the versions of Python and of what decides on speed."""
        return versions(self.python)

    def bare(self, app: str = "bare", path: str = "/", workers: int = 1) -> Server:
        """An app of `apps/` on the stock worker of gunicorn and uvicorn."""
        port = free_port()
        command = [
            *(str(self.python), "-m", "gunicorn", f"{app}:app"),
            *("--bind", f"127.0.0.1:{port}"),
        ]
        command += [*("--workers", str(workers), "--worker-class", "uvicorn_worker.UvicornWorker")]
        command += [
            "--no-control-socket",
            "--keep-alive",
            "75",
        ]  # no file in a home; as the service's
        settings = {"DATABASE_URL": self.database.geturl(), "POOL_SIZE": str(POOL_SIZE)}
        name = "bare FastAPI" + (" + asyncpg" if app == "bare_postgres" else "")
        return Server(name, command, self.folder / "apps", port, path, settings)

    def service(self, path: str = "/", workers: int = 1, **settings: str) -> Server:
        """The generated service as in production: JSON lines into a pipe, metrics and all limits on."""
        port, metrics_port = free_port(), free_port()
        settings = {
            "DATABASE_URL": self.database.geturl(),
            "REDIS_URL": self.redis.geturl(),
            "BIND": f"127.0.0.1:{port}",
            "METRICS_BIND": f"127.0.0.1:{metrics_port}",
            "WEB_CONCURRENCY": str(workers),
            "LOG_FORMAT": "json",
            "PYTHONPATH": str(self.folder / "apps"),
        } | settings
        command = [str(self.python), "-m", "gunicorn", "stored:app"]
        return Server("the service", command, self.project, port, path, settings, signal.SIGINT)

    def new_payment(self) -> str:
        """Store a payment; return its path."""
        with self.service("/health/ready") as service:
            base = service.url.removesuffix(service.path)
            status, body = fetch(
                base + "/payments", "POST", PAYMENT, {"Idempotency-Key": uuid4().hex}
            )
        if status != 201:
            raise BenchError(f"POST /payments answered {status}: {body.decode()[:200]}")
        return f"/stored/{json.loads(body)['payment_id']}"

    def slow_down(self, seconds: float) -> None:
        """From now on each query of a payment takes so many seconds more, as under a lock or on a busy disk."""
        self.call("-c", SLOW_QUERIES.format(seconds=seconds))


def versions(python: Path) -> dict[str, str]:
    """Return the version of Python and of the packages that are installed for it, of those that decide on speed."""
    names = [
        "gunicorn",
        "uvicorn",
        "uvicorn-worker",
        "uvloop",
        "httptools",
        "fastapi",
        "starlette",
        "pydantic",
    ]
    names += ["asyncpg", "prometheus-client", "prometheus-fastapi-instrumentator"]
    code = (
        "import importlib.metadata as m, json, platform, sys\n"
        "found = {d.metadata['name'].lower().replace('_', '-'): d.version for d in m.distributions()}\n"
        "print(json.dumps({'python': platform.python_version()} | {n: found[n] for n in sys.argv[1:] if n in found}))"
    )
    done = subprocess.run([python, "-c", code, *names], capture_output=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


@contextlib.contextmanager
def open_site(folder: Path) -> Iterator[Site]:
    """Bake and install the service below a folder, start a Postgres with its tables and a Redis; end them at the end.

    It takes a few seconds with a warm cache of uv.
    """
    bake = [sys.executable, "-m", "cookiecutter", str(demo.ROOT), "--no-input", "--default-config"]
    subprocess.run([*bake, "--output-dir", str(folder)], check=True, stdout=subprocess.DEVNULL)
    project = folder / "my-service"
    demo.set_up(project, PYTHON=python())
    shutil.copytree(HERE / "apps", folder / "apps", ignore=shutil.ignore_patterns("__pycache__"))
    executable = project / ".venv/bin/python"
    services = subprocess.Popen(
        [executable, "-m", "scripts.dev_services", "sh", "-c", HOLD],
        cwd=project,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert services.stdin
    assert services.stdout
    try:
        database, redis = (services.stdout.readline().decode().strip() for _ in range(2))
        if not redis:
            raise BenchError("the throw-away Postgres and Redis did not start")
        site = Site(folder, project, executable, urlsplit(database), urlsplit(redis))
        site.call("-m", "alembic", "upgrade", "head")
        yield site
    finally:
        services.stdin.close()
        services.wait()
        services.stdout.close()
