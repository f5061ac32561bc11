"""The most used template, generated from its package with Redis, Postgres and Prometheus."""

import os
import shutil
import subprocess
from pathlib import Path

from benchmarks import BenchError
from benchmarks.servers import Server, environment
from benchmarks.testbed import Testbed
from scripts import demo
from scripts.ports import free_port

PACKAGE = "fastapi_template"
VERSION = "6.1.2"
#: One pin each makes it work. By its own ranges it resolves to a FastAPI with which its metrics
#: package returns 500 on every API route. Either that package comes from above the peer's range,
#: or FastAPI from before the change.
PINS = {"peer": "prometheus-fastapi-instrumentator==8.1.0", "peer_old": "fastapi==0.136.3"}
#: Pinned to the service's versions in the first case, so that only the two templates' own code
#: differs; gunicorn stays below 24.
SHARED = (
    "fastapi",
    "starlette",
    "uvicorn",
    "pydantic",
    "uvloop",
    "httptools",
    "prometheus-client",
    "asyncpg",
)
OPTIONS = ("--api-type", "rest", "--db", "postgresql", "--orm", "sqlalchemy", "--ci", "none")
FEATURES = ("--migrations", "--redis", "--prometheus", "--gunicorn", "--routers")
#: The handler of the other two servers, added to the peer's health check.
ROUTE = '''

@router.get("/describe")
async def describe() -> dict[str, str]:
    """Return the same as the service."""
    return {"service": "my-service", "version": "0.0.0"}
'''


class Peer:
    """The generated peer, with one environment for each of `PINS`."""

    def __init__(self, testbed: Testbed) -> None:
        """Install and generate.

        Raises `BenchError` if that fails, for example without a network.
        """
        self.testbed = testbed
        tools = Path(os.environ.get("TOOLS", demo.ROOT / ".tools"))
        self.uv = shutil.which("uv") or str(tools / "bin/uv")
        directory = testbed.directory / "peer"
        self.project = directory / "peer"
        self._generate(directory)
        self.pythons = {
            name: self._install_pinned(directory / f"venv-{name}", pin)
            for name, pin in PINS.items()
        }

    def _generate(self, directory: Path) -> None:
        generator = self._create_environment(directory / "generator")
        self._install(generator, f"{PACKAGE}=={VERSION}")
        # Its hook runs `uv sync`, which resolves to versions that do not work together. A missing
        # interpreter stops that early.
        path = f"{Path(self.uv).parent}{os.pathsep}{os.environ['PATH']}"
        settings = environment(HOME=str(directory), PATH=path, UV_PYTHON=str(directory / "none"))
        program = str(generator.with_name(PACKAGE))
        command = [program, "--quiet", "--name", "peer", *OPTIONS, *FEATURES]
        self._run(command, directory, settings)
        views = self.project / "peer/web/api/monitoring/views.py"
        # Checked, since its exit code is 0 after a failure too.
        if not views.exists():
            raise BenchError(f"{PACKAGE} {VERSION} generated nothing")
        with views.open("a") as file:
            file.write(ROUTE)

    def _install_pinned(self, directory: Path, pin: str) -> Path:
        python = self._create_environment(directory)
        versions = self.testbed.versions()
        shared = set(SHARED)
        if pin.startswith("fastapi"):
            shared -= {"fastapi", "starlette"}
        constraints = "".join(f"{name}=={versions[name]}\n" for name in sorted(shared))
        pin_file = directory / "pin.txt"
        pin_file.write_text(pin)
        constraints_file = directory / "constraints.txt"
        constraints_file.write_text(constraints)
        options = ["--override", str(pin_file), "--constraint", str(constraints_file)]
        self._install(python, *options, "--requirements", str(self.project / "pyproject.toml"))
        return python

    def _create_environment(self, directory: Path) -> Path:
        command = [self.uv, "venv", "--quiet", "--python", str(self.testbed.python), str(directory)]
        self._run(command, self.testbed.directory)
        return directory / "bin/python"

    def _install(self, python: Path, *requirements: str) -> None:
        command = [self.uv, "pip", "install", "--quiet", "--python", str(python), *requirements]
        self._run(command, self.testbed.directory)

    def _run(
        self, command: list[str], directory: Path, settings: dict[str, str] | None = None
    ) -> None:
        done = subprocess.run(
            command, cwd=directory, env=settings, capture_output=True, text=True, check=False
        )
        if done.returncode:
            output = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
            shown = f"{Path(command[0]).name} {' '.join(command[1:4])}"
            raise BenchError(f"{shown}: {output[0]}")

    def server(
        self, path: str = "/api/describe", workers: int = 1, variant: str = "peer"
    ) -> Server:
        """Return the peer, run by the command of its image, with one of `PINS`."""
        port = free_port()
        database = self.testbed.database
        redis = self.testbed.redis
        settings = {
            "HOST": "127.0.0.1",
            "PORT": str(port),
            "RELOAD": "false",
            "ENVIRONMENT": "production",
            "WORKERS_COUNT": str(workers),
            "DB_HOST": str(database.hostname),
            "DB_PORT": str(database.port),
            "DB_USER": str(database.username),
            "DB_PASS": str(database.password),
            "DB_BASE": database.path.strip("/"),
            "REDIS_HOST": str(redis.hostname),
            "REDIS_PORT": str(redis.port),
            "PROMETHEUS_DIR": str(self.testbed.directory / f"peer/prometheus-{port}"),
        }
        prefixed = {f"PEER_{name}": value for name, value in settings.items()}
        command = [str(self.pythons[variant]), "-m", "peer"]
        return Server(PACKAGE, command, self.project, port, path, prefixed)
