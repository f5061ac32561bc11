"""`make token`, and the issuer of `make dev AUTH=1`."""

import json
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from app.settings import load_settings
from scripts import dev_issuer
from tests.auth.test_provider import decode, verify
from tests.service_process import PROJECT


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of development of its own."""
    monkeypatch.setenv("DEV_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("ENVIRONMENT", "development")
    monkeypatch.delenv("AUTH", raising=False)
    # `issuing` sets them, and the test's end restores them.
    for name in ("AUTH_ISSUER", "AUTH_AUDIENCE", "AUTH_JWKS_URL"):
        monkeypatch.setenv(name, "")
    return tmp_path


def print_token(**variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.dev_token"]
    environment = {name: value for name, value in variables.items() if value}
    return subprocess.run(
        ["env", *(f"{name}={value}" for name, value in environment.items()), *command],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_token_is_of_the_issuer_that_the_service_trusts(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RFC 9068, section 2; only the token is printed. Each command has the same key."""
    monkeypatch.setenv("AUTH", "1")
    done = print_token(SCOPES="orders:read, orders:write", SUBJECT="ann", SECONDS="60")
    assert done.stderr == ""
    (token,) = done.stdout.splitlines()
    with dev_issuer.issuing() as guide:
        assert "make token" in guide
        settings = load_settings()
        (jwk,) = httpx.get(str(settings.auth_jwks_url)).json()["keys"]
    assert "d" not in jwk
    claims = verify(token, jwk)
    assert json.loads(decode(token.partition(".")[0])) == {
        "alg": "ES256",
        "typ": "at+jwt",
        "kid": jwk["kid"],
    }
    assert claims["iss"] == settings.auth_issuer
    assert claims["aud"] == settings.auth_audience
    assert (claims["sub"], claims["scope"]) == ("ann", "orders:read orders:write")
    assert claims["exp"] - claims["iat"] == 60  # type: ignore[operator]
    (file,) = directory.glob("issuer*")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("seconds", ["0", "-1", "an hour"])
def test_invalid_lifetime_is_one_line(seconds: str) -> None:
    done = print_token(SECONDS=seconds)
    assert done.returncode == 1
    assert done.stderr == f"SECONDS={seconds}: must be a number of seconds, for example 3600\n"


def test_without_auth_nothing_is_set_and_no_key_is_made(directory: Path) -> None:
    with dev_issuer.issuing() as guide:
        assert guide == "`make dev AUTH=1`"
        assert load_settings().auth_issuer is None
    assert list(directory.iterdir()) == []


def test_own_issuer_and_auth_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTH_ISSUER", "https://login.example")
    monkeypatch.setenv("AUTH_AUDIENCE", "orders")
    with dev_issuer.issuing() as guide:
        assert guide == "of https://login.example"
    monkeypatch.setenv("AUTH", "1")
    with pytest.raises(SystemExit) as rejected:
        dev_issuer.issuing().__enter__()
    assert "AUTH_ISSUER=https://login.example: must be unset" in str(rejected.value)


@pytest.mark.parametrize("environment", ["production", "staging"])
def test_issuer_of_development_is_an_error_elsewhere(
    environment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTH_ISSUER", dev_issuer.ISSUER)
    monkeypatch.setenv("AUTH_AUDIENCE", "orders")
    assert load_settings().auth_issuer == dev_issuer.ISSUER
    monkeypatch.setenv("ENVIRONMENT", environment)
    with pytest.raises(SystemExit) as rejected:
        load_settings()
    assert f"AUTH_ISSUER={dev_issuer.ISSUER}: must be https://" in str(rejected.value)
