"""Settings from the environment and from secret files; errors stop the start.

The error is one line with the setting and its requirement.
"""

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


def load_error(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    """Load invalid settings; return the line of the error, without its prefix."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as error:
        load_settings()
    line = str(error.value)
    assert line.startswith("configuration error: ")
    assert "\n" not in line
    return line.removeprefix("configuration error: ")


# Documentation


def test_env_example_lists_every_setting_once() -> None:
    listed = re.findall(r"^#?([A-Z_]+)=.*$", EXAMPLE, re.MULTILINE)
    assert sorted(listed) == sorted(name.upper() for name in Settings.model_fields)


def test_env_example_contains_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = Settings()
    for name, value in re.findall(r"^([A-Z_]+)=(.*)$", EXAMPLE, re.MULTILINE):
        monkeypatch.setenv(name, value)
    assert Settings() == defaults


def test_env_example_comments_out_secrets_and_missing_defaults() -> None:
    """Settings whose default depends on another one are commented out too."""
    commented = set(re.findall(r"^#([A-Z_]+)=", EXAMPLE, re.MULTILINE))
    computed = {"BIND", "DOCS_ENABLED", "MAX_BUFFERED_BYTES", "REDIS_KEY_PREFIX"}
    empty = {name.upper() for name, value in Settings() if value in (None, "", ())}
    secret = {name.upper() for name, value in Settings() if isinstance(value, SecretStr)}
    assert commented == empty | secret | computed


def test_readme_lists_every_setting() -> None:
    readme = (PROJECT / "README.md").read_text()
    missing = [name for name in Settings.model_fields if f"`{name.upper()}`" not in readme]
    assert missing == []


# Values from the environment


def test_empty_value_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", "")
    monkeypatch.setenv("LOG_LEVEL", "")
    assert Settings() == Settings(log_level="info", web_concurrency=None)


def test_enumerations_ignore_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENVIRONMENT", "Staging")
    monkeypatch.setenv("LOG_FORMAT", "JSON")
    monkeypatch.setenv("LOG_LEVEL", "DEBUG")
    settings = Settings()
    assert settings.environment == "staging"
    assert settings.log_format == "json"
    assert settings.log_level == "debug"


@pytest.mark.parametrize(("port", "bind"), [("", "127.0.0.1:8000"), ("8080", "0.0.0.0:8080")])
def test_default_of_bind_depends_on_port(
    monkeypatch: pytest.MonkeyPatch, port: str, bind: str
) -> None:
    monkeypatch.setenv("PORT", port)
    assert Settings().bind == bind


@pytest.mark.parametrize(
    ("environment", "enabled"), [("development", True), ("staging", False), ("production", False)]
)
def test_docs_are_enabled_only_in_development(
    monkeypatch: pytest.MonkeyPatch, environment: str, enabled: bool
) -> None:
    monkeypatch.setenv("ENVIRONMENT", environment)
    assert Settings().docs_enabled is enabled


def test_log_fields_are_pairs_of_names_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_FIELDS", "team=checkout, region=eu west=1,")
    assert Settings().log_fields == (("team", "checkout"), ("region", "eu west=1"))
    assert "at most 500 characters" in load_error(monkeypatch, LOG_FIELDS="team=" + "a" * 500)


def test_settings_are_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().log_level = "debug"


# Invalid values


@pytest.mark.parametrize(
    ("name", "value", "requirement"),
    [
        ("ENVIRONMENT", "prod", "'development', 'staging' or 'production'"),
        ("LOG_FORMAT", "xml", "'auto', 'json', 'gcp' or 'console'"),
        ("WEB_CONCURRENCY", "0", "greater than 0"),
        ("WEB_CONCURRENCY", "two", "a valid integer"),
        ("PORT", "70000", "less than or equal to 65535"),
        ("BIND", "8000", "must be host:port"),
        ("BIND", "http://x:1", "must be host:port"),
        ("METRICS_BIND", "localhost", "must be host:port"),
        ("BIND", "127.0.0.1:99999", "must be host:port"),
        ("BIND", "127.0.0.1:0", "must be host:port"),
        ("SERVICE_NAME", "My Service", "must be a name without spaces"),
        ("WORKERS_PER_CORE", "inf", "finite"),
        ("FORWARDED_ALLOW_IPS", "10.0.0.0/8,nonsense", "'nonsense' must be an IP address"),
        ("READINESS_REQUIRED", "mysql", "'postgres' or 'redis'"),
        ("ROOT_PATH", "api/", "must be a path without a slash at its end, for example /api"),
        ("DATABASE_COMMAND_TIMEOUT_SECONDS", "-1", "greater than 0"),
        ("DOCS_ENABLED", "perhaps", "a valid boolean"),
        ("METRICS_PREFIX", "orders", "the last an underscore, for example orders_"),
        ("METRICS_PREFIX", "or-ders_", "letters, digits and underscores"),
        ("METRICS_PREFIX", "1_", "letters, digits and underscores"),
        ("METRICS_BUCKETS", "0.1,0.5s", "must be seconds above 0, comma-separated and ascending"),
        ("METRICS_BUCKETS", "0.5,0.1", "ascending, for example 0.1,0.5,1"),
        ("METRICS_BUCKETS", "0.1,0.1", "ascending"),
        ("METRICS_BUCKETS", "0,1", "above 0"),
        ("METRICS_BUCKETS", "1,inf", "must be seconds"),
        ("METRICS_BUCKETS", "nan", "must be seconds"),
        ("METRICS_BUCKETS", ",", "must be seconds"),
        ("METRICS_MAX_LABEL_SETS", "0", "greater than 0"),
        ("LOG_FIELDS", "team", "must be name=value, comma-separated, for example team=checkout"),
        ("LOG_FIELDS", "Team=a", "must be name=value"),
        ("LOG_FIELDS", "team=", "must be name=value"),
        ("LOG_FIELDS", "team=a,team=b", "team must not be set twice"),
        ("LOG_FIELDS", "pid=1", "pid is a field of the service itself; choose another name"),
    ],
)
def test_invalid_value_is_reported_with_its_requirement(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, requirement: str
) -> None:
    line = load_error(monkeypatch, **{name: value})
    assert line.startswith(f"{name}={value}: ")
    assert requirement in line


@pytest.mark.parametrize(
    ("value", "culprit"),
    [
        ("10.0.0.256", "'10.0.0.256'"),
        ("10.0.0.0/33", "'10.0.0.0/33'"),
        ("10.0.0.1/8", "'10.0.0.1/8'"),
        ("127.0.0.1,10.0.0", "'10.0.0'"),
        ("10.0.0.01", "'10.0.0.01'"),
        ("10.0.0.1:8000", "'10.0.0.1:8000'"),
        ("[::1]", "'[::1]'"),
        ("::1/129", "'::1/129'"),
        ("fd00::1/8", "'fd00::1/8'"),
        ("fe80::1%eth0", "'fe80::1%eth0'"),
        ("localhost", "'localhost'"),
        ("/run/nginx.sock", "'/run/nginx.sock'"),
        ("0.0.0.0", "'0.0.0.0' is never"),
        ("::", "'::' is never"),
        ("224.0.0.1", "'224.0.0.1' is never"),
        ("*,10.0.0.1", "or * alone"),
        ("10.*", "'10.*'"),
        (",", "must be addresses"),
    ],
)
def test_trusted_proxy_that_never_matches_is_rejected_by_name(
    monkeypatch: pytest.MonkeyPatch, value: str, culprit: str
) -> None:
    """uvicorn compares such a value with the text of an address, and never trusts it."""
    line = load_error(monkeypatch, FORWARDED_ALLOW_IPS=value)
    assert line.startswith(f"FORWARDED_ALLOW_IPS={value}: ")
    assert culprit in line


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("*", "*"),
        ("10.0.0.0/8,::1", "10.0.0.0/8,::1"),
        (" 10.0.0.1 , fd00::/8 ", "10.0.0.1,fd00::/8"),
        ("10.0.0.1 10.0.0.2", "10.0.0.1,10.0.0.2"),
        ("10.0.0.0/255.0.0.0", "10.0.0.0/255.0.0.0"),
        ("0.0.0.0/0,::/0", "0.0.0.0/0,::/0"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
    ],
)
def test_trusted_proxies_are_addresses_and_networks(
    monkeypatch: pytest.MonkeyPatch, value: str, expected: str
) -> None:
    """IPv4-mapped ones (RFC 4291, section 2.5.5.2) are those of IPv4, as all clients are."""
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", value)
    assert load_settings().forwarded_allow_ips == expected


@pytest.mark.parametrize(
    "origin",
    [
        "https://a.example/",
        "https://a.example/path",
        "https://a.example?query",
        "https://user@a.example",
        "a.example",
        "//a.example",
        "https://",
        "https:a.example",
        "https://A.example",
        "HTTPS://a.example",
        "https://a.example:443",
        "http://a.example:80",
        "https://a.example:",
        "https://a.example:0",
        "https://a.example:08443",
        "https://a.example:65536",
        "https://*.a.example",
        "https://bücher.example",
        "https://10.0.0.256",
        "http://[::0001]:8080",
        "http://::1",
        "file://",
        "localhost:3000",
    ],
)
def test_origin_that_no_browser_sends_is_rejected_by_name(
    monkeypatch: pytest.MonkeyPatch, origin: str
) -> None:
    """RFC 6454, section 6.2. Starlette compares the whole text with the `Origin` header."""
    line = load_error(monkeypatch, CORS_ALLOW_ORIGINS=f"https://ok.example,{origin}")
    assert line.startswith("CORS_ALLOW_ORIGINS=")
    assert f"{origin!r} must be an origin" in line


def test_wildcard_is_rejected_next_to_other_origins(monkeypatch: pytest.MonkeyPatch) -> None:
    line = load_error(monkeypatch, CORS_ALLOW_ORIGINS="https://a.example,*")
    assert line.endswith("must be origins, or * alone")


@pytest.mark.parametrize(
    "origins",
    [
        "*",
        "null",
        "https://a.example",
        "https://a.example,http://localhost:3000",
        "https://xn--bcher-kva.example",
        "http://[::1]:8080",
        "http://10.0.0.1",
        "capacitor://localhost",
        "chrome-extension://abcdefghijklmnop",
    ],
)
def test_origins_that_browsers_send_are_accepted(
    monkeypatch: pytest.MonkeyPatch, origins: str
) -> None:
    monkeypatch.setenv("CORS_ALLOW_ORIGINS", origins)
    assert load_settings().cors_allow_origins == tuple(origins.split(","))


def test_several_errors_are_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A default that depends on an invalid setting, such as `BIND`, is no error."""
    line = load_error(monkeypatch, LOG_LEVEL="loud", PORT="x")
    assert "LOG_LEVEL=loud" in line
    assert "PORT=x" in line
    assert "BIND" not in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "mysql://app:hunter2@db/x"),
        ("DATABASE_REPLICA_URL", "mysql://app:hunter2@db/x"),
        ("DATABASE_URL", "postgresql://app:hunter2/x@db/x"),
        ("DATABASE_URL", "postgresql://app:hunter2@db:abc/x"),
        ("REDIS_URL", "http://app:hunter2@cache"),
        ("REDIS_URL", "redis://:hunter2/x@cache:6379/0"),
        ("REDIS_URL", "redis://:hunter2@cache:99999/0"),
    ],
)
def test_invalid_secret_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    line = load_error(monkeypatch, **{name: value})
    assert line.startswith(f"{name}: must be ")
    assert "hunter2" not in line


def test_invalid_value_is_shown_without_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    line = load_error(monkeypatch, METRICS_BIND="http://app:hunter2@nowhere")
    assert line.startswith("METRICS_BIND=nowhere: must be ")


def test_line_break_in_a_value_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """It could forge a line of the log."""
    assert "\\n" in load_error(monkeypatch, LOG_LEVEL="a\nb" + "c" * 1000)


# Secret files


def test_secret_file_sets_its_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "DATABASE_URL").write_text("postgresql://app:pw@db/app\n")
    monkeypatch.setenv("SECRETS_DIR", str(tmp_path))
    settings = load_settings()
    assert settings.database_url.get_secret_value() == "postgresql://app:pw@db/app"
    assert "pw" not in repr(settings)


def test_empty_secret_file_counts_as_unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "REDIS_URL").write_text("\n")
    monkeypatch.setenv("SECRETS_DIR", str(tmp_path))
    monkeypatch.setenv("REDIS_URL", "redis://b")
    assert load_settings().redis_url.get_secret_value() == "redis://b"


def test_setting_in_file_and_environment_is_rejected(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "redis_url").write_text("redis://a")
    line = load_error(monkeypatch, SECRETS_DIR=str(tmp_path), REDIS_URL="redis://b")
    assert line == "REDIS_URL: is set in both SECRETS_DIR and the environment; remove one"


def test_missing_secrets_directory_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    line = load_error(monkeypatch, SECRETS_DIR="/does/not/exist")
    assert line.startswith("SECRETS_DIR=/does/not/exist: ")


@pytest.mark.parametrize("name", ["databaseurl", "database_url.txt", "DATABASE_URL~", "a\nb"])
def test_secret_file_that_is_no_setting_is_rejected_by_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """pydantic-settings ignores the file, and the service would use the default."""
    (tmp_path / name).write_text("postgresql://app:s3cret@db/app")
    line = load_error(monkeypatch, SECRETS_DIR=str(tmp_path))
    assert line.startswith(f"SECRETS_DIR={str(tmp_path)[:20]}")
    assert line.endswith(f": has files that are named like no setting: {name!a}")
    assert "s3cret" not in line


def test_files_of_kubernetes_next_to_the_secrets_are_ignored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """kubelet's AtomicWriter: each file is a link into `..data`, a link to a hidden directory."""
    (tmp_path / "kubernetes.io").mkdir()
    (tmp_path / "..2026_11_29").mkdir()
    (tmp_path / "..2026_11_29/redis_url").write_text("redis://b")
    (tmp_path / "..data").symlink_to("..2026_11_29")
    (tmp_path / "redis_url").symlink_to("..data/redis_url")
    (tmp_path / ".updated").touch()
    monkeypatch.setenv("SECRETS_DIR", str(tmp_path))
    assert load_settings().redis_url.get_secret_value() == "redis://b"


def test_directory_in_place_of_a_secret_file_is_rejected(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "REDIS_URL").mkdir()
    assert "redis_url" in load_error(monkeypatch, SECRETS_DIR=str(tmp_path)).lower()


def test_binary_secret_file_is_rejected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "REDIS_URL").write_bytes(b"\xff\xfe")
    assert "redis_url" in load_error(monkeypatch, SECRETS_DIR=str(tmp_path))


# Processes


@pytest.mark.process
@pytest.mark.parametrize(
    "command",
    [["-m", "gunicorn"], ["-m", "app.sizing"], ["-m", "app.settings"], ["-c", "import app.main"]],
)
def test_every_entry_point_fails_with_one_line(command: list[str]) -> None:
    environment = os.environ | {"REDIS_URL": "nonsense:hunter2"}
    done = subprocess.run(
        [sys.executable, *command], cwd=PROJECT, env=environment, capture_output=True, check=False
    )
    expected = "configuration error: REDIS_URL: must be redis://:password@host:port/0\n"
    assert done.returncode != 0
    assert done.stderr.decode() == expected
    assert done.stdout == b""
