"""The most used peer: generated from its package at run time, with Redis, Postgres, Prometheus and gunicorn."""

import os
import shutil
import subprocess
from pathlib import Path

from benchmarks import BenchError
from benchmarks.servers import Server, environment
from benchmarks.site import Site, free_port
from scripts import demo

PACKAGE = "fastapi_template"
VERSION = "6.1.2"
#: What makes it answer. Left to itself it resolves to a FastAPI with which its metrics package answers 500 on every API
#: route. Either that package is taken from above the peer's own range, or FastAPI from before the change.
PINS = {"peer": "prometheus-fastapi-instrumentator==8.1.0", "peer_old": "fastapi==0.136.3"}
#: Held at the service's versions in the first case, so that the two differ in their own code; gunicorn stays below 24.
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
#: The handler of the other two, beside the peer's own health check.
ROUTE = '''

@router.get("/describe")
async def describe() -> dict[str, str]:
    """Answer what the service answers."""
    return {"service": "my-service", "version": "0.0.0"}
'''


class Peer:
    """The generated peer, with an environment for each of `PINS`."""

    def __init__(self, site: Site) -> None:
        """Install and generate; raises `BenchError` where that cannot be done, such as without a network."""
        self.site = site
        self.uv = shutil.which("uv") or str(
            Path(os.environ.get("TOOLS", demo.ROOT / ".tools")) / "bin/uv"
        )
        folder = site.folder / "peer"
        self.project = folder / "peer"
        generator = self._environment(folder / "generator")
        self._install(generator, f"{PACKAGE}=={VERSION}")
        # Its hook runs `uv sync`, whose versions do not work together: an interpreter that is none stops that early.
        path = f"{Path(self.uv).parent}{os.pathsep}{os.environ['PATH']}"
        settings = environment(HOME=str(folder), PATH=path, UV_PYTHON=str(folder / "none"))
        command = [
            str(generator.with_name(PACKAGE)),
            "--quiet",
            "--name",
            "peer",
            *OPTIONS,
            *FEATURES,
        ]
        self._run(command, folder, settings)
        views = self.project / "peer/web/api/monitoring/views.py"
        if not views.exists():  # it exits with 0 all the same
            raise BenchError(f"{PACKAGE} {VERSION} generated nothing")
        with views.open("a") as file:
            file.write(ROUTE)
        self.pythons = {
            name: self._installed(folder / f"venv-{name}", pin) for name, pin in PINS.items()
        }

    def _installed(self, folder: Path, pin: str) -> Path:
        python, held = self._environment(folder), self.site.versions()
        shared = [
            name
            for name in SHARED
            if not (pin.startswith("fastapi") and name in {"fastapi", "starlette"})
        ]
        (folder / "pin.txt").write_text(pin)
        (folder / "constraints.txt").write_text(
            "".join(f"{name}=={held[name]}\n" for name in shared)
        )
        bounds = [
            "--override",
            str(folder / "pin.txt"),
            "--constraint",
            str(folder / "constraints.txt"),
        ]
        self._install(python, *bounds, "--requirements", str(self.project / "pyproject.toml"))
        return python

    def _environment(self, folder: Path) -> Path:
        self._run(
            [self.uv, "venv", "--quiet", "--python", str(self.site.python), str(folder)],
            self.site.folder,
        )
        return folder / "bin/python"

    def _install(self, python: Path, *what: str) -> None:
        self._run(
            [self.uv, "pip", "install", "--quiet", "--python", str(python), *what], self.site.folder
        )

    def _run(
        self, command: list[str], folder: Path, settings: dict[str, str] | None = None
    ) -> None:
        done = subprocess.run(
            command, cwd=folder, env=settings, capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
            raise BenchError(f"{Path(command[0]).name} {' '.join(command[1:4])}: {said[0]}")

    def server(
        self, path: str = "/api/describe", workers: int = 1, variant: str = "peer"
    ) -> Server:
        """The peer by the command of its image, with one of `PINS`."""
        port, database, redis = free_port(), self.site.database, self.site.redis
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
            "PROMETHEUS_DIR": str(self.site.folder / f"peer/prometheus-{port}"),
        }
        prefixed = {f"PEER_{name}": value for name, value in settings.items()}
        return Server(
            PACKAGE, [str(self.pythons[variant]), "-m", "peer"], self.project, port, path, prefixed
        )
