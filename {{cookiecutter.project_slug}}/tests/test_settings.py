"""Settings come from the environment and from secret files; a wrong one ends the start with one clear line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from app.settings import Settings, load_settings
from tests.service_process import PROJECT

EXAMPLE = (PROJECT / ".env.example").read_text()


def refusal(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    """Return the line with which the start ends."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as error:
        load_settings()
    line = str(error.value)
    assert line.startswith("configuration error: ")
    assert "\n" not in line
    return line.removeprefix("configuration error: ")


def test_env_example_lists_every_setting_once_with_its_default() -> None:
    listed = re.findall(r"^#?([A-Z_]+)=(.*)$", EXAMPLE, re.MULTILINE)
    assert sorted(name for name, _ in listed) == sorted(
        name.upper() for name in Settings.model_fields
    )


def test_env_example_as_it_stands_changes_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = Settings()
    for name, value in re.findall(r"^([A-Z_]+)=(.*)$", EXAMPLE, re.MULTILINE):
        monkeypatch.setenv(name, value)
    assert Settings() == defaults


def test_env_example_comments_out_just_what_has_no_default_or_is_a_secret() -> None:
    commented = set(re.findall(r"^#([A-Z_]+)=", EXAMPLE, re.MULTILINE))
    computed = {"BIND", "DOCS_ENABLED"}
    empty = {name.upper() for name, value in Settings() if value in (None, "", ())}
    secret = {name.upper() for name, value in Settings() if isinstance(value, SecretStr)}
    assert commented == empty | secret | computed


def test_readme_lists_every_setting() -> None:
    readme = (PROJECT / "README.md").read_text()
    assert [name for name in Settings.model_fields if f"`{name.upper()}`" not in readme] == []


def test_an_empty_value_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", "")
    monkeypatch.setenv("LOG_LEVEL", "")
    assert Settings() == Settings(log_level="info", web_concurrency=None)


def test_words_may_be_in_upper_case(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "ENVIRONMENT": "Staging",
        "LOG_FORMAT": "JSON",
        "LOG_LEVEL": "DEBUG",
    }.items():
        monkeypatch.setenv(name, value)
    assert (Settings().environment, Settings().log_format, Settings().log_level) == (
        "staging",
        "json",
        "debug",
    )


@pytest.mark.parametrize(("port", "bind"), [("", "127.0.0.1:8000"), ("8080", "0.0.0.0:8080")])
def test_bind_follows_port(monkeypatch: pytest.MonkeyPatch, port: str, bind: str) -> None:
    monkeypatch.setenv("PORT", port)
    assert Settings().bind == bind


@pytest.mark.parametrize(
    ("environment", "enabled"), [("development", True), ("staging", False), ("production", False)]
)
def test_docs_are_on_in_development_only(
    monkeypatch: pytest.MonkeyPatch, environment: str, enabled: bool
) -> None:
    monkeypatch.setenv("ENVIRONMENT", environment)
    assert Settings().docs_enabled is enabled


@pytest.mark.parametrize(
    ("name", "value", "takes"),
    [
        ("ENVIRONMENT", "prod", "'development', 'staging' or 'production'"),
        ("LOG_FORMAT", "xml", "'auto', 'json' or 'console'"),
        ("WEB_CONCURRENCY", "0", "greater than 0"),
        ("WEB_CONCURRENCY", "two", "a valid integer"),
        ("PORT", "70000", "less than or equal to 65535"),
        ("BIND", "8000", "host:port"),
        ("BIND", "http://x:1", "host:port"),
        ("METRICS_BIND", "localhost", "host:port"),
        ("BIND", "127.0.0.1:99999", "host:port"),
        ("BIND", "127.0.0.1:0", "host:port"),
        ("SERVICE_NAME", "My Service", "a name without spaces"),
        ("WORKERS_PER_CORE", "inf", "finite"),
        ("FORWARDED_ALLOW_IPS", "10.0.0.0/8,nonsense", "should match pattern"),
        ("READINESS_REQUIRED", "mysql", "'postgres' or 'redis'"),
        ("ROOT_PATH", "api/", "a path such as /api"),
        ("DATABASE_COMMAND_TIMEOUT_SECONDS", "-1", "greater than 0"),
        ("DOCS_ENABLED", "perhaps", "a valid boolean"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, takes: str
) -> None:
    line = refusal(monkeypatch, **{name: value})
    assert line.startswith(f"{name}={value}: ")
    assert takes in line


def test_several_faults_stand_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    line = refusal(monkeypatch, LOG_LEVEL="loud", PORT="x")
    assert "LOG_LEVEL=loud" in line
    assert "PORT=x" in line
    assert "BIND" not in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "mysql://app:hunter2@db/x"),
        ("DATABASE_URL", "postgresql://app:hunter2/x@db/x"),
        ("DATABASE_URL", "postgresql://app:hunter2@db:abc/x"),
        ("REDIS_URL", "http://app:hunter2@cache"),
        ("REDIS_URL", "redis://:hunter2/x@cache:6379/0"),
        ("REDIS_URL", "redis://:hunter2@cache:99999/0"),
    ],
)
def test_a_wrong_secret_is_named_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    line = refusal(monkeypatch, **{name: value})
    assert line.startswith(f"{name}: takes ")
    assert "hunter2" not in line


def test_what_is_shown_of_a_wrong_value_has_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    line = refusal(monkeypatch, METRICS_BIND="http://app:hunter2@nowhere")
    assert line.startswith("METRICS_BIND=nowhere: takes ")


def test_a_forged_value_stays_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\\n" in refusal(monkeypatch, LOG_LEVEL="a\nb" + "c" * 1000)


def test_a_secret_file_sets_its_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "DATABASE_URL").write_text("postgresql://app:pw@db/app\n")
    monkeypatch.setenv("SECRETS_DIR", str(tmp_path))
    assert load_settings().database_url.get_secret_value() == "postgresql://app:pw@db/app"
    assert "pw" not in repr(load_settings())


def test_an_empty_secret_file_counts_as_unset(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "REDIS_URL").write_text("\n")
    monkeypatch.setenv("SECRETS_DIR", str(tmp_path))
    monkeypatch.setenv("REDIS_URL", "redis://b")
    assert load_settings().redis_url.get_secret_value() == "redis://b"


def test_a_secret_that_is_a_folder_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "REDIS_URL").mkdir()
    assert "redis_url" in refusal(monkeypatch, SECRETS_DIR=str(tmp_path)).lower()


def test_the_same_setting_as_file_and_in_the_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "redis_url").write_text("redis://a")
    line = refusal(monkeypatch, SECRETS_DIR=str(tmp_path), REDIS_URL="redis://b")
    assert line.startswith("REDIS_URL: stands in SECRETS_DIR and in the environment")


def test_a_secrets_folder_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(monkeypatch, SECRETS_DIR="/does/not/exist").startswith(
        "SECRETS_DIR=/does/not/exist: "
    )


def test_a_secret_file_that_is_no_text_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "REDIS_URL").write_bytes(b"\xff\xfe")
    assert "redis_url" in refusal(monkeypatch, SECRETS_DIR=str(tmp_path))


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().log_level = "debug"


@pytest.mark.parametrize(
    "command",
    [["-m", "gunicorn"], ["-m", "app.sizing"], ["-m", "app.settings"], ["-c", "import app.main"]],
)
def test_every_entry_point_ends_with_the_line_alone(command: list[str]) -> None:
    environment = os.environ | {"REDIS_URL": "nonsense:hunter2"}
    done = subprocess.run(
        [sys.executable, *command], cwd=PROJECT, env=environment, capture_output=True, check=False
    )
    assert done.returncode != 0
    assert (
        done.stderr.decode()
        == "configuration error: REDIS_URL: takes redis://:password@host:port/0\n"
    )
    assert done.stdout == b""
