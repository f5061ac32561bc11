"""The temporary Postgres and Redis: started if none is configured, then deleted."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from scripts import compose_secrets
from scripts.dev_services import free_port, is_listening
from tests.service_process import PROJECT, eventually

RUN = [sys.executable, "-m", "scripts.dev_services"]
SHOW = ["sh", "-c", 'echo "$DATABASE_URL $REDIS_URL ${WEB_CONCURRENCY-unset}"']


def run(*command: str, **variables: str) -> str:
    done = subprocess.run(
        [*RUN, *command], cwd=PROJECT, env=os.environ | variables, capture_output=True, check=True
    )
    return done.stdout.decode().strip()


def test_urls_in_the_environment_are_used() -> None:
    variables = {"DATABASE_URL": "postgresql://a", "REDIS_URL": "redis://b", "WEB_CONCURRENCY": ""}
    assert run(*SHOW, **variables) == "postgresql://a redis://b unset"


def test_urls_in_secret_files_are_used(tmp_path: Path) -> None:
    for name in ("DATABASE_URL", "REDIS_URL"):
        (tmp_path / name).write_text("x")
    assert run(*SHOW, SECRETS_DIR=str(tmp_path)).split() == ["unset"]


def test_the_exit_code_of_the_command_is_returned() -> None:
    variables = {"DATABASE_URL": "postgresql://a", "REDIS_URL": "redis://b"}
    done = subprocess.run(
        [*RUN, "sh", "-c", "exit 7"], cwd=PROJECT, env=os.environ | variables, check=False
    )
    assert done.returncode == 7


@pytest.mark.parametrize("seconds", [0.2, 0.5, 0.8])
def test_ctrl_c_during_the_start_leaves_no_files(seconds: float) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        process = subprocess.Popen(
            [*RUN, "sleep", "60"],
            cwd=PROJECT,
            env=os.environ | {"TMPDIR": name},
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        eventually(lambda: list(directory.iterdir()))
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=90)
        assert process.returncode != 0
        assert b"Traceback" not in errors
        assert list(directory.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts Postgres as another user")
def test_inaccessible_temporary_directory_is_one_clear_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [*RUN, "true"],
        cwd=PROJECT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1
    assert b"set TMPDIR to a directory that all users may enter" in done.stderr
    assert b"Traceback" not in done.stderr


def test_free_port_can_be_listened_on() -> None:
    port = free_port()
    assert not is_listening(port)
    with socket.create_server(("127.0.0.1", port)):
        assert is_listening(port)


def test_compose_secrets_are_created_once_and_match(tmp_path: Path) -> None:
    directory = tmp_path / ".secrets"
    compose_secrets.create_secrets(directory)
    texts = read_files(directory)
    password = texts["postgres_password"]
    assert len(password) >= 24
    assert texts["database_url"] == f"postgresql://app:{password}@postgres:5432/app"
    assert directory.stat().st_mode & 0o777 == 0o700
    compose_secrets.create_secrets(directory)
    assert read_files(directory) == texts


def read_files(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}
