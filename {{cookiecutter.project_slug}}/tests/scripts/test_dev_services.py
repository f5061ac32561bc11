"""The throw-away Postgres and Redis: started where nobody named others, and gone afterwards."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from scripts import compose_secrets
from tests.service_process import PROJECT, eventually

RUN = [sys.executable, "-m", "scripts.dev_services"]
SHOW = ["sh", "-c", 'echo "$DATABASE_URL $REDIS_URL ${WEB_CONCURRENCY-unset}"']


def run(*command: str, **variables: str) -> str:
    done = subprocess.run(
        [*RUN, *command], cwd=PROJECT, env=os.environ | variables, capture_output=True, check=True
    )
    return done.stdout.decode().strip()


def test_urls_of_the_environment_win() -> None:
    named = {"DATABASE_URL": "postgresql://a", "REDIS_URL": "redis://b", "WEB_CONCURRENCY": ""}
    assert run(*SHOW, **named) == "postgresql://a redis://b unset"


def test_urls_of_secret_files_win(tmp_path: Path) -> None:
    for name in ("DATABASE_URL", "REDIS_URL"):
        (tmp_path / name).write_text("x")
    assert run(*SHOW, SECRETS_DIR=str(tmp_path)).split() == ["unset"]


def test_the_exit_code_is_that_of_the_command() -> None:
    named = {"DATABASE_URL": "postgresql://a", "REDIS_URL": "redis://b"}
    done = subprocess.run(
        [*RUN, "sh", "-c", "exit 7"], cwd=PROJECT, env=os.environ | named, check=False
    )
    assert done.returncode == 7


@pytest.mark.parametrize("seconds", [0.2, 0.5, 0.8])
def test_ctrl_c_while_it_starts_leaves_nothing(seconds: float) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        process = subprocess.Popen(
            [*RUN, "sleep", "60"],
            cwd=PROJECT,
            env=os.environ | {"TMPDIR": name},
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        eventually(lambda: list(folder.iterdir()))
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=90)
        assert process.returncode != 0
        assert b"Traceback" not in errors
        assert list(folder.iterdir()) == []


@pytest.mark.skipif(
    os.geteuid() != 0, reason="only root has folders that the server's user may not enter"
)
def test_a_folder_that_the_server_may_not_enter_is_one_clear_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [*RUN, "true"],
        cwd=PROJECT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1
    assert b"set TMPDIR to a folder that everybody may enter" in done.stderr
    assert b"Traceback" not in done.stderr


def test_secrets_of_compose_are_made_once_and_agree(tmp_path: Path) -> None:
    folder = tmp_path / ".secrets"
    compose_secrets.make(folder)
    texts = {path.name: path.read_text() for path in folder.iterdir()}
    assert len(texts["postgres_password"]) >= 24
    assert (
        texts["database_url"] == f"postgresql://app:{texts['postgres_password']}@postgres:5432/app"
    )
    assert folder.stat().st_mode & 0o777 == 0o700
    compose_secrets.make(folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == texts
