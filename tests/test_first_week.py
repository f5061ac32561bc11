"""The first week of a new user, as one session: only commands of the README, no variables set."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from scripts.ports import eventually
from tests.conftest import bake_to

START_SECONDS = 180
#: Variables of this test run that a user does not have. Those of package indexes stay.
UNUSUAL = re.compile(
    r"(MAKE|PYTEST|COVERAGE|PYTHON|UV_CACHE)\w*|MFLAGS|VENV|VIRTUAL_ENV|TOOLS|CI|.*_BIN"
)


class User:
    """A user in the directory of a project."""

    def __init__(self, project: Path) -> None:
        self.project = project
        inherited = os.environ.items()
        self.environment = {name: value for name, value in inherited if not UNUSUAL.fullmatch(name)}

    def make(self, *targets: str, text: str = "") -> str:
        """Run make targets with an input; return their output. Fails with it."""
        done = subprocess.run(
            ["make", *targets],
            cwd=self.project,
            env=self.environment,
            input=text,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-10_000:]
        return done.stdout

    def edit(self, name: str, before: str, after: str) -> None:
        """Replace a text that a file contains once."""
        path = self.project / name
        text = path.read_text()
        assert text.count(before) == 1
        path.write_text(text.replace(before, after))

    @contextlib.contextmanager
    def dev(self) -> Iterator["Dev"]:
        """Run `make dev` in a terminal during the block; then press Ctrl-C."""
        dev = Dev(self)
        try:
            yield dev
        finally:
            family = psutil.Process(dev.process.pid).children(recursive=True)
            os.killpg(dev.process.pid, signal.SIGINT)
            eventually(lambda: (dev.read(), dev.process.poll() is not None)[1])
            os.close(dev.master)
        _, alive = psutil.wait_procs(family, 10)
        assert alive == []


class Dev:
    """`make dev` in a terminal."""

    def __init__(self, user: User) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            ["make", "dev"],
            cwd=user.project,
            env=user.environment,
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
        with contextlib.suppress(OSError):  # no output at the moment
            while part := os.read(self.master, 65_536):
                self.text += part.decode(errors="replace")
        return self.text

    def wait_until_ready(self) -> str:
        """Return the URL that it prints, once the service is ready."""

        def url() -> str:
            assert self.process.poll() is None, self.read()
            found = re.search(r"^  service +(\S+)/\s", self.read(), re.MULTILINE)
            return found[1] if found else ""

        eventually(url, START_SECONDS)
        eventually(lambda: httpx.get(f"{url()}/health/ready").status_code == 200)
        return url()


@pytest.fixture
def user(template: Path) -> Iterator[User]:
    """A user with a new project, which is no git repository, in a path with spaces."""
    with tempfile.TemporaryDirectory(prefix="week-", dir="/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield User(bake_to(template, directory / "my first week", project_name="Order Desk"))


def stop_at_breakpoint(user: User, dev: Dev, url: str) -> None:
    """Set a breakpoint, send a request, look at a variable, and go on."""
    line = '        return {"service": settings.service_name'
    user.edit("app/main.py", line, f"        breakpoint()\n{line}")
    eventually(lambda: "changed, reloading: app/main.py" in dev.read())
    eventually(lambda: httpx.get(f"{url}/health/live").status_code == 200)
    get = f"import httpx; print(httpx.get({url!r}, timeout=60).status_code)"
    with subprocess.Popen([sys.executable, "-c", get], stdout=subprocess.PIPE) as request:
        eventually(lambda: "(Pdb)" in dev.read())
        os.write(dev.master, b"p settings.service_name\ncontinue\n")
        output, _ = request.communicate(timeout=60)
    assert output == b"200\n"
    assert "'order-desk'" in dev.read()
    user.edit("app/main.py", "        breakpoint()\n", "")


@pytest.mark.slow
def test_first_week(user: User) -> None:
    """No step fails, and none needs knowledge outside of the README."""
    with user.dev() as dev:
        url = dev.wait_until_ready()
        note = "create table notes (note text); insert into notes values ('still here')"
        user.make("psql", text=note)
        assert "3 rows are in the database" in user.make("seed")
        assert len(httpx.get(f"{url}/payments").json()["items"]) == 3
        stop_at_breakpoint(user, dev, url)
    assert "Traceback" not in dev.text
    assert "still here" in user.make("psql", text="select note from notes")

    user.make("migration", "M=add a column")
    user.make("feature", "N=orders")
    user.make("format")
    user.make("lint", "types")
    user.make("test", "T=tests/orders")
    user.make("test-fast")

    user.make("remove-example")
    user.make("format")
    user.make("lint")
    assert "is deleted" in user.make("dev-reset")
    user.make("migrate")
    assert "0 rows are in the database" in user.make("seed")
