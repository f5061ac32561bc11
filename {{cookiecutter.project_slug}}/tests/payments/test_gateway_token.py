"""A gateway that requires a token, which the consumer gets by client credentials."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from app.payments.gateway import check_gateway, trust_authorities_and_public_ones
from app.settings import Settings, load_settings
from scripts.fake_gateway import FakeGateway
from tests.auth.provider import Provider, Trouble, running_provider
from tests.payments.test_consumer import consuming, pay, status, wait_until_settled
from tests.payments.test_gateway_tls import directory  # noqa: F401 - a fixture
from tests.service_process import Service, eventually

process = pytest.mark.process
SECRET = "secret-1"


@pytest.fixture
def provider() -> Iterator[Provider]:
    with running_provider() as provider:
        yield provider


@pytest.fixture
def credentials(provider: Provider, tmp_path: Path) -> dict[str, str]:
    """Settings of a consumer. The secret is in a file."""
    (tmp_path / "gateway_client_secret").write_text(SECRET)
    return {
        "GATEWAY_TOKEN_URL": provider.token_url,
        "GATEWAY_CLIENT_ID": "client-1",
        "GATEWAY_TOKEN_SCOPES": "charges:write",
        "GATEWAY_TOKEN_AUDIENCE": "gateway",
        "SECRETS_DIR": str(tmp_path),
    }


@process
def test_charges_carry_one_token(
    urls: dict[str, str],
    service: Service,
    gateway: FakeGateway,
    provider: Provider,
    credentials: dict[str, str],
) -> None:
    """They wait for a provider that fails, as for a gateway that fails.

    Neither the token nor the secret is in the log.
    """
    with (
        provider.trouble(Trouble.ERROR),
        consuming(**urls, **credentials, LOG_LEVEL="debug") as consumer,
    ):
        first = pay(service)
        eventually(lambda: "no new token" in consumer.text)
        assert status(service, first) == "pending"
        assert consumer.is_ready()
        assert gateway.requests == []
        provider.troubles = {}
        for payment_id in [first, pay(service), pay(service)]:
            wait_until_settled(service, payment_id)
        (token,) = provider.issued_tokens
        assert token not in consumer.text
        assert SECRET not in consumer.text
    assert gateway.charges[first] == 1
    assert {call.headers["Authorization"] for call in gateway.requests} == {f"Bearer {token}"}
    (request,) = provider.token_requests
    assert request.form["scope"] == "charges:write"
    assert request.form["audience"] == "gateway"


VALID = {
    "gateway_url": "https://gateway.example",
    "gateway_token_url": "https://login.example/token",
    "gateway_client_id": "client-1",
    "gateway_client_secret": SecretStr(SECRET),
}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"gateway_client_id": ""}, "GATEWAY_CLIENT_ID: must be set, since"),
        ({"gateway_client_secret": SecretStr("")}, "GATEWAY_CLIENT_SECRET: must be set, since"),
        (
            {"gateway_token_url": "http://login.example/token"},
            "GATEWAY_TOKEN_URL=http://login.example/token: must be https:// unless",
        ),
        (
            {"gateway_url": "https://user:hunter2@gateway.example"},
            "GATEWAY_URL=gateway.example: must have no login, since",
        ),
    ],
)
def test_incomplete_credentials_stop_the_start(changes: dict[str, object], line: str) -> None:
    with pytest.raises(SystemExit) as rejected:
        check_gateway(Settings().model_copy(update={**VALID, **changes}))
    assert str(rejected.value).startswith(f"configuration error: {line}")
    check_gateway(Settings().model_copy(update=VALID))


@pytest.mark.parametrize("url", ["https://a:b@login.example/token", "login.example", "ftp://a/b"])
def test_invalid_token_url_is_rejected(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_TOKEN_URL", url)
    with pytest.raises(SystemExit) as rejected:
        load_settings()
    shown = url.rpartition("@")[2]
    assert f"GATEWAY_TOKEN_URL={shown}: must be https://login.example" in str(rejected.value)


def test_provider_may_have_a_certificate_of_either_kind(directory: Path) -> None:  # noqa: F811
    """The file has one authority; certifi has over 100."""
    tls = trust_authorities_and_public_ones(directory / "authority.pem")
    assert tls is not None
    subjects = [certificate["subject"] for certificate in tls.get_ca_certs()]
    assert ((("commonName", "authority"),),) in subjects
    assert len(subjects) > 100
