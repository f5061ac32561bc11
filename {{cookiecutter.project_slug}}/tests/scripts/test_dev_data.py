"""The Postgres and Redis of development: shared by commands, kept between them, never left over."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from scripts.dev_data import PUBLIC_DIRECTORY, stop_servers
from scripts.dev_services import free_port, is_listening
from tests.service_process import PROJECT, eventually

RUN = [sys.executable, "-m", "scripts.dev_environment"]
RESET = [sys.executable, "-m", "scripts.dev_data", "reset"]
SHOW = ["sh", "-c", 'echo "$DATABASE_URL $REDIS_URL ${WEB_CONCURRENCY-unset}"']
COUNT_TABLES = "select count(*) from pg_tables where schemaname = 'public'"
#: It prints the URLs once the servers run, and waits for the end of its input.
HOLD = ["sh", "-c", 'echo "$DATABASE_URL $REDIS_URL"; cat']
PSQL = [sys.executable, "-m", "scripts.psql", "--tuples-only", "--no-align"]


@pytest.fixture(scope="module")
def data() -> Iterator[Path]:
    """A directory for the data that Postgres' user may enter, unlike those of pytest."""
    with tempfile.TemporaryDirectory(prefix="dev-", dir="/tmp") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path / "dev data"
        eventually(lambda: processes(path) == [])


def variables(data: Path, **others: str) -> dict[str, str]:
    return os.environ | {"DEV_DIRECTORY": str(data)} | others


def run(data: Path, *command: str, text: str = "", **others: str) -> str:
    """Run a command with the servers and return its output."""
    done = subprocess.run(
        [*RUN, *command],
        cwd=PROJECT,
        env=variables(data, **others),
        input=text,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


class Held:
    """A command that holds the servers until it is stopped."""

    def __init__(self, data: Path, *parent: str) -> None:
        self.process = subprocess.Popen(
            [*parent, *RUN, *HOLD],
            cwd=PROJECT,
            env=variables(data),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout
        self.urls = self.process.stdout.readline().strip()
        self.ports = [urlsplit(url).port or 0 for url in self.urls.split()]

    def stop(self) -> None:
        """End the input of the command, and wait for it."""
        self.process.communicate()

    def __enter__(self) -> "Held":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.stdin and not self.process.stdin.closed:
            self.stop()


def processes(data: Path) -> list[psutil.Process]:
    """Return the servers and keepers of a directory. Redis shows its port as its command line."""
    port_file = data / "redis/port"
    redis = f":{port_file.read_text()}" if port_file.exists() else str(data)
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if str(data) in command or redis in command:
            found.append(process)
    return found


def reset(data: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        RESET, cwd=PROJECT, env=variables(data), capture_output=True, text=True, check=False
    )


def test_urls_in_the_environment_are_used(tmp_path: Path) -> None:
    own = {"DATABASE_URL": "postgresql://a", "REDIS_URL": "redis://b", "WEB_CONCURRENCY": ""}
    assert run(tmp_path, *SHOW, **own) == "postgresql://a redis://b unset"
    assert list(tmp_path.iterdir()) == []


def test_urls_in_secret_files_are_used(tmp_path: Path) -> None:
    for name in ("DATABASE_URL", "REDIS_URL"):
        (tmp_path / name).write_text("x")
    assert run(tmp_path, *SHOW, SECRETS_DIR=str(tmp_path)).split() == ["unset"]


def test_the_exit_code_of_the_command_is_returned() -> None:
    own = {"DATABASE_URL": "postgresql://a", "REDIS_URL": "redis://b"}
    done = subprocess.run(
        [*RUN, "sh", "-c", "exit 7"], cwd=PROJECT, env=os.environ | own, check=False
    )
    assert done.returncode == 7


def test_commands_share_the_servers_and_the_last_one_stops_them(data: Path) -> None:
    """The data and the URLs stay the same for the next command."""
    with Held(data) as first:
        insert = "create table kept (number int); insert into kept values (7)"
        assert run(data, *PSQL, text=insert)
        with Held(data) as second:
            assert second.urls == first.urls
            first.stop()
            assert all(map(is_listening, second.ports))
    assert not any(map(is_listening, second.ports))
    eventually(lambda: processes(data) == [])
    assert run(data, *PSQL, text="select number from kept") == "7"
    assert run(data, *SHOW).startswith(first.urls)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_signal_stops_the_command_and_the_servers(data: Path, number: int) -> None:
    """SIGHUP is a closed terminal, SIGKILL the stop button of some editors.

    `cat` ends with SIGTERM; after SIGKILL nothing can end it, and it holds no lock.
    """
    with Held(data) as held:
        held.process.send_signal(number)
        held.process.wait()
    eventually(lambda: processes(data) == [])


def test_end_of_the_parent_ends_the_command_and_the_servers(data: Path) -> None:
    """The parent is make, which an editor may kill with SIGKILL."""
    parent = [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])"]
    with Held(data, *parent) as held:
        held.process.kill()
        held.process.wait()
        eventually(lambda: processes(data) == [])


def test_pid_of_a_killed_server_that_is_in_use_again_is_ignored(data: Path) -> None:
    """In a container pids are small, and soon used again."""
    run(data, "true")
    (data / "postgres/data/postmaster.pid").write_text(f"{os.getpid()}\n")
    (data / "redis/pid").write_text(f"{os.getpid()}\n")
    assert run(data, *PSQL, text="select 1") == "1"


@pytest.mark.parametrize(("argument", "age"), [("x{port}y", 0), ("{port}", 3600)])
def test_process_with_a_reused_pid_is_not_stopped(tmp_path: Path, argument: str, age: int) -> None:
    """Neither a port within another argument, nor an older start is that of the server."""
    port = str(free_port())
    command = [sys.executable, "-c", "input()", argument.format(port=port)]
    (tmp_path / "redis").mkdir()
    (tmp_path / "redis/port").write_text(port)
    with subprocess.Popen(command, stdin=subprocess.PIPE) as other:
        pid_file = tmp_path / "redis/pid"
        pid_file.write_text(str(other.pid))
        os.utime(pid_file, (time.time() - age,) * 2)
        stop_servers(tmp_path)
        assert other.poll() is None
        other.communicate(b"\n")
    assert other.returncode == 0


def test_killed_servers_are_started_again(data: Path) -> None:
    with Held(data) as held:
        for server in processes(data):
            if "keep" not in server.cmdline():
                server.kill()
        eventually(lambda: not any(map(is_listening, held.ports)))
        assert run(data, *PSQL, text="select 1") == "1"


def test_data_of_another_postgres_is_one_clear_line(data: Path) -> None:
    run(data, "true")
    version = data / "postgres/data/PG_VERSION"
    before = version.read_text()
    version.write_text("9\n")
    command = [*RUN, "true"]
    done = subprocess.run(
        command, cwd=PROJECT, env=variables(data), capture_output=True, text=True, check=False
    )
    version.write_text(before)
    assert done.returncode == 1
    assert "Postgres 9 made this data" in done.stderr
    assert "make dev-reset" in done.stderr
    assert done.stderr.count("\n") == 1


def test_interrupted_creation_is_repeated(data: Path) -> None:
    run(data, "true")
    (data / "postgres/created").unlink()
    assert run(data, *PSQL, text=COUNT_TABLES) == "0"


def test_reset_deletes_the_data_unless_a_command_uses_it(data: Path) -> None:
    with Held(data):
        rejected = reset(data)
        assert rejected.returncode == 1
        assert "in use; stop `make dev`" in rejected.stderr
    eventually(lambda: processes(data) == [])
    done = reset(data)
    assert done.returncode == 0, done.stderr
    assert not (data / "postgres").exists()
    assert not (data / "redis").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts Postgres as another user")
def test_postgres_of_root_gets_a_directory_that_its_user_may_enter(tmp_path: Path) -> None:
    """A project below `/root` is one that no other user may enter."""
    tmp_path.chmod(0o700)
    assert run(tmp_path / "dev", *PSQL, text="select 1") == "1"
    home = (tmp_path / "dev/postgres").resolve()
    assert home.parent == PUBLIC_DIRECTORY.resolve()
    assert reset(tmp_path / "dev").returncode == 0
    assert not home.exists()


@pytest.mark.parametrize("seconds", [0.2, 0.5, 0.8])
def test_ctrl_c_during_the_start_leaves_no_process(data: Path, seconds: float) -> None:
    process = subprocess.Popen(
        [*RUN, "sleep", "60"], cwd=PROJECT, env=variables(data), start_new_session=True
    )
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=90)
    assert process.returncode != 0
    eventually(lambda: processes(data) == [])
