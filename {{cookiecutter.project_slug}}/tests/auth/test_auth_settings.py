"""Settings of authentication that contradict each other, or over which keys could be replaced."""

import pytest

from app.settings import Settings, load_settings

ISSUER = {"AUTH_ISSUER": "https://login.example/", "AUTH_AUDIENCE": "orders"}


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (ISSUER | {"AUTH_DISABLED": "true"}, "AUTH_DISABLED=true: must be unset with AUTH_ISSUER"),
        ({"AUTH_ISSUER": "https://a.example"}, "AUTH_AUDIENCE: must be set, since AUTH_ISSUER is"),
        ({"AUTH_AUDIENCE": "a"}, "AUTH_ISSUER: must be set, since AUTH_AUDIENCE is"),
        (
            {"AUTH_JWKS_URL": "https://a.example"},
            "AUTH_ISSUER: must be set, since AUTH_JWKS_URL is",
        ),
        (
            ISSUER | {"AUTH_ISSUER": "http://login.example"},
            "AUTH_ISSUER=http://login.example: must be https:// outside development",
        ),
        (
            ISSUER | {"AUTH_JWKS_URL": "http://login.example/keys"},
            "AUTH_JWKS_URL=http://login.example/keys: must be https:// outside development",
        ),
        (
            ISSUER | {"AUTH_JWKS_URL": "https://login.example/keys#a"},
            "AUTH_JWKS_URL=https://login.example/keys#a: must be https://",
        ),
        (
            ISSUER | {"AUTH_ISSUER": "https://login.example/?p=a"},
            "AUTH_ISSUER=https://login.example/?p=a: must be https://",
        ),
        (ISSUER | {"AUTH_ISSUER": "login.example"}, "AUTH_ISSUER=login.example: must be https://"),
        (ISSUER | {"AUTH_ISSUER": "file:///a"}, "AUTH_ISSUER=file:///a: must be https://"),
        (
            ISSUER | {"AUTH_ISSUER": "https://u:secret@login.example"},
            "AUTH_ISSUER=login.example: must have no login",
        ),
        (ISSUER | {"AUTH_ALGORITHMS": "HS256"}, "AUTH_ALGORITHMS=HS256: should be 'RS256', "),
        (ISSUER | {"AUTH_ALGORITHMS": "none"}, "AUTH_ALGORITHMS=none: should be 'RS256', "),
        (ISSUER | {"AUTH_ALGORITHMS": ","}, "AUTH_ALGORITHMS=,: "),
        (ISSUER | {"AUTH_LEEWAY_SECONDS": "301"}, "less than or equal to 300"),
        (ISSUER | {"LOG_PRINCIPAL": "full"}, "LOG_PRINCIPAL=full: should be 'hashed', "),
    ],
)
def test_contradiction_is_one_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], error: str
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as raised:
        load_settings()
    text = str(raised.value)
    assert text.startswith("configuration error: ")
    assert error in text
    assert "secret" not in text
    assert "\n" not in text


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost:8080", "[::1]:8080"])
def test_loopback_needs_no_https(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    for name, value in (ISSUER | {"AUTH_ISSUER": f"http://{host}"}).items():
        monkeypatch.setenv(name, value)
    assert load_settings().auth_issuer == f"http://{host}"


def test_development_needs_no_https() -> None:
    issuer = "http://keycloak:8080/realms/a"
    settings = Settings(environment="development", auth_issuer=issuer, auth_audience="a")
    assert settings.auth_issuer == issuer


@pytest.mark.parametrize(
    ("settings", "is_open"),
    [
        ({}, True),
        ({"environment": "staging"}, True),
        ({"environment": "development"}, False),
        ({"auth_disabled": True}, False),
        ({"auth_issuer": "https://a.example", "auth_audience": "a"}, False),
    ],
)
def test_service_is_open_unless_a_setting_decides(
    settings: dict[str, object], is_open: bool
) -> None:
    values: dict[str, object] = {"environment": "production", **settings}
    assert Settings.model_validate(values).is_open is is_open
