"""The keys of the issuer: when they are fetched, and what happens without them."""

import asyncio
import sys
from collections.abc import AsyncIterator

import httpx
import pytest

from app.auth import authenticator, jwks, keys
from app.auth.dependencies import AUTHENTICATED, Principal, require
from app.auth.errors import KeysUnavailableError
from app.main import create_app
from app.settings import OPEN, Settings
from scripts.dev_services import Redis, free_port
from tests.auth.provider import DISCOVERY, JWKS, Provider, Trouble, running_provider
from tests.auth.tokens import AUDIENCE, signing_key
from tests.conftest import InProcess
from tests.patience import patience
from tests.service_process import serving
from tests.streams import Client


def with_issuer(settings: Settings, issuer: str, **changes: object) -> Settings:
    """Return valid settings with an issuer."""
    values = settings.model_dump() | {"auth_issuer": issuer, "auth_audience": AUDIENCE} | changes
    return Settings(**values)


def create(settings: Settings) -> InProcess:
    """Return the service with a route that requires a scope."""
    app = create_app(settings, dependencies=[AUTHENTICATED])

    @app.get("/orders", dependencies=[require("orders:read")])
    async def orders(principal: Principal) -> str:
        return principal.subject

    return InProcess(app)


@pytest.fixture
def source(settings: Settings, provider: Provider) -> keys.KeySource:
    """The keys of the provider, without the refresh in the background."""
    return keys.KeySource(with_issuer(settings, provider.issuer))


@pytest.fixture
async def client(settings: Settings, provider: Provider) -> AsyncIterator[Client]:
    async with create(with_issuer(settings, provider.issuer)) as client:
        yield client


def authorization(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def test_without_an_issuer_everybody_may_do_everything(settings: Settings) -> None:
    """The caller is anonymous, whatever a route requires; tokens are not looked at."""
    async with create(settings) as client:
        assert (await client.get("/orders")).json() == ""
        response = await client.get("/orders", headers=authorization("invalid"))
        assert response.status_code == 200


def test_service_that_authenticates_nobody_warns_once(database_url: str, redis: Redis) -> None:
    """Not once per worker."""
    urls = {"DATABASE_URL": database_url, "REDIS_URL": redis.url}
    with serving(AUTH_DISABLED="false", **urls) as service:
        service.wait_for_workers(2)
        warnings = [line for line in service.lines if line["logger"] == "app.auth"]
        assert [line["message"] for line in warnings] == [OPEN]


def test_document_without_an_issuer_has_no_security_scheme(settings: Settings) -> None:
    """Clients that trust it would send tokens in vain."""
    document = create(settings).app.openapi()
    assert "securitySchemes" not in document["components"]
    assert "security" not in document["paths"]["/orders"]["get"]


async def test_keys_are_fetched_once_for_all_that_wait(
    provider: Provider, source: keys.KeySource
) -> None:
    found = await asyncio.gather(*(source.find("rs256") for _ in range(50)))
    assert len({id(key) for key in found}) == 1
    assert found[0] is not None
    assert provider.fetches == {DISCOVERY: 1, JWKS: 1}


async def test_few_requests_wait_for_a_hung_provider(
    provider: Provider, source: keys.KeySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others are rejected at once, so requests with known keys have the places of the worker."""
    monkeypatch.setattr(keys, "WAIT_SECONDS", 0.2)
    source.max_waiting = 3
    with provider.trouble(Trouble.FROZEN):
        results = await asyncio.gather(
            *(source.find("rs256") for _ in range(10)), return_exceptions=True
        )
        assert {type(result).__name__ for result in results} == {"KeysUnavailableError"}
    assert source.waiting == 0
    assert provider.fetches[DISCOVERY] == 1
    assert source.fetching is not None
    source.fetching.cancel()


async def test_service_starts_without_its_provider_and_recovers(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """503 with `Retry-After` until then; readiness is not concerned."""
    monkeypatch.setattr(keys, "COOL_DOWN_SECONDS", 0.2)
    port = free_port()
    issuer = f"http://127.0.0.1:{port}"
    async with create(with_issuer(settings, issuer)) as client:
        with running_provider(port) as provider:
            token = provider.mint(scope="orders:read")
        response = await client.get("/orders", headers=authorization(token))
        assert response.status_code == 503
        assert int(response.headers["Retry-After"]) >= 1
        assert (await client.get("/health/ready")).status_code == 200
        with running_provider(port):
            await eventually_ok(client, token)


async def eventually_ok(client: Client, token: str) -> httpx.Response:
    async with patience(20):
        while True:
            response = await client.get("/orders", headers=authorization(token))
            if response.status_code == 200:
                return response
            await asyncio.sleep(0.05)


async def test_keys_are_refreshed_before_they_are_too_old(
    settings: Settings, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the background: no request waits for it."""
    monkeypatch.setattr(keys, "COOL_DOWN_SECONDS", 0.05)
    monkeypatch.setattr(keys, "MIN_AGE_SECONDS", 0.1)
    provider.cache_control = "max-age=0"
    async with create(with_issuer(settings, provider.issuer)), patience(20):
        while provider.fetches[JWKS] < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_rotation_without_a_change_of_known_keys_forgets_no_token(
    client: Client, provider: Provider
) -> None:
    token = provider.mint(scope="orders:read")
    await eventually_ok(client, token)
    remembered = client_authenticator(client)
    assert len(remembered.remembered) == 1
    remembered.forget()
    assert (await client.get("/orders", headers=authorization(token))).status_code == 200
    assert len(remembered.remembered) == 1


def client_authenticator(client: Client) -> authenticator.Authenticator:
    transport = client._transport
    assert isinstance(transport, httpx.ASGITransport)
    found: authenticator.Authenticator = transport.app.state["authenticator"]  # type: ignore[attr-defined]
    return found


async def test_remembered_tokens_are_bounded(
    client: Client, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest is forgotten; it is accepted, and remembered, again."""
    monkeypatch.setattr(authenticator, "MAX_REMEMBERED", 3)
    minted = [provider.mint(scope="orders:read", jti=str(number)) for number in range(5)]
    for token in (*minted, minted[0]):
        await eventually_ok(client, token)
    remembered = client_authenticator(client).remembered
    assert list(remembered) == [key_of(client, minted[number]) for number in (3, 4, 0)]


def key_of(client: Client, token: str) -> int:
    return hash(client_authenticator(client).salt + f"Bearer {token}".encode())


async def test_signature_of_a_remembered_token_is_not_valid_for_other_claims(
    client: Client, provider: Provider
) -> None:
    """No token is in memory: only what its signature signs."""
    token = provider.mint(scope="orders:read")
    await eventually_ok(client, token)
    signature = token.rpartition(".")[2]
    other = provider.mint(scope="orders:read", sub="admin").rpartition(".")[0]
    for forged in (f"{other}.{signature}", f".{signature}", signature):
        response = await client.get("/orders", headers=authorization(forged))
        assert response.status_code == 401
    remembered = client_authenticator(client).remembered
    assert token.rpartition(".")[0] in str(remembered)
    assert signature not in str(remembered)
    await eventually_ok(client, token)


async def test_header_with_the_hash_of_a_remembered_token_is_not_valid_for_other_claims(
    client: Client, provider: Provider
) -> None:
    """Two headers may have the same hash. What is signed is compared too."""
    token = provider.mint(scope="orders:read")
    await eventually_ok(client, token)
    remembered = client_authenticator(client).remembered
    signature = token.rpartition(".")[2]
    other = provider.mint(scope="orders:read", sub="admin").rpartition(".")[0]
    forged = f"{other}.{signature}"
    remembered[key_of(client, forged)] = remembered[key_of(client, token)]
    response = await client.get("/orders", headers=authorization(forged))
    assert response.status_code == 401


async def never(_: bytes) -> authenticator.Verified:
    raise NotImplementedError


def test_hash_of_a_header_cannot_be_guessed(settings: Settings) -> None:
    """Remembered tokens rely on 64 bits, which depend on each byte of the header, and on the salt.

    With `PYTHONHASHSEED` set, Python's own key is the same in all processes.
    """
    salts = {authenticator.Authenticator(settings, never).salt for _ in range(2)}
    assert {len(salt) for salt in salts} == {16}
    assert len(salts) == 2
    assert sys.hash_info.width == 64
    assert sys.hash_info.algorithm.startswith("siphash")
    assert sys.hash_info.cutoff == 0


async def test_remembered_token_expires(client: Client, provider: Provider) -> None:
    token = provider.mint(scope="orders:read")
    await eventually_ok(client, token)
    remembered = client_authenticator(client).remembered
    remembered[key_of(client, token)].expires_at = 0.0
    assert (await client.get("/orders", headers=authorization(token))).status_code == 200
    assert remembered[key_of(client, token)].expires_at > 0


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ({"issuer": "https://other.example"}, "its issuer is not"),
        ({"jwks_uri": "http://other.example/jwks"}, "unusable discovery document"),
        ({"jwks_uri": "file:///etc/passwd"}, "unusable discovery document"),
        ({"jwks_uri": None}, "unusable discovery document"),
    ],
)
async def test_discovery_document_of_another_is_not_believed(
    provider: Provider,
    source: keys.KeySource,
    metadata: dict[str, object],
    error: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """OpenID Connect Discovery 1.0, section 4.3. No scheme but https, or http on this machine."""
    provider.metadata = metadata
    with pytest.raises(KeysUnavailableError):
        await source.find("rs256")
    assert error in caplog.text
    assert provider.fetches == {DISCOVERY: 1}


async def test_url_of_the_keys_needs_no_discovery(settings: Settings, provider: Provider) -> None:
    """The issuer may be a name that this machine cannot reach."""
    changed = with_issuer(settings, "https://login.example", auth_jwks_url=provider.jwks_url)
    source = keys.KeySource(changed)
    assert await source.find("es256") is not None
    assert provider.fetches == {JWKS: 1}


async def test_only_key_needs_no_id(provider: Provider, source: keys.KeySource) -> None:
    provider.keys = [signing_key("ES256")]
    assert await source.find(None) is not None


@pytest.mark.parametrize(
    ("cache_control", "seconds"),
    [
        ("max-age=300", 300),
        ("public, max-age=21600, must-revalidate", 3600),
        ("max-age=1", 60),
        ("no-store", 60),
        ("s-maxage=900", 600),
        ("max-age=many", 600),
        ("", 600),
    ],
)
def test_cache_control_counts_within_bounds(cache_control: str, seconds: float) -> None:
    """RFC 9111, section 5.2.2.1."""
    assert keys.max_age_seconds(cache_control) == seconds


EC = signing_key("ES256").jwk


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"use": "enc"}, "it is not for signatures"),
        ({"key_ops": ["sign"]}, "it is not for signatures"),
        ({"alg": "RS256"}, "no algorithm for kty EC"),
        ({"kty": "oct", "k": "AAAA"}, "no algorithm for kty oct"),
        ({"crv": "secp256k1"}, "no algorithm for kty EC"),
        ({"x": "AAAA"}, ""),
        ({"kid": 7}, "its kid is not a text"),
    ],
)
def test_unusable_key_is_left_out(changes: dict[str, object], problem: str) -> None:
    """RFC 7517, section 4; RFC 8725, section 3.1."""
    good = signing_key("EdDSA").jwk
    document = httpx.Request("POST", "http://a", json={"keys": [EC | changes, good]}).content
    found, problems = jwks.parse_keys(document)
    assert list(found) == ["eddsa"]
    (text,) = problems
    assert problem in text


def test_first_of_two_keys_with_the_same_id_is_used() -> None:
    """Providers should not publish such (RFC 7517, section 4.5), so the log names it."""
    other = signing_key("EdDSA").jwk | {"kid": EC["kid"]}
    document = httpx.Request("POST", "http://a", json={"keys": [EC, other]}).content
    found, problems = jwks.parse_keys(document)
    assert [key.algorithms for key in found.values()] == [{"ES256"}]
    assert problems == ["'es256': another key has the same kid"]


async def test_url_of_the_keys_may_have_a_query(settings: Settings, provider: Provider) -> None:
    """Azure AD B2C names its policy there."""
    provider.metadata = {"jwks_uri": f"{provider.jwks_url}?p=policy"}
    source = keys.KeySource(with_issuer(settings, provider.issuer))
    await source.find("es256")
    assert provider.fetches == {DISCOVERY: 1, f"{JWKS}?p=policy": 1}


@pytest.mark.parametrize("document", [b"[]", b"{}", b'{"keys": {}}', b"<html>", b'{"keys": [1]}'])
def test_document_without_keys_is_an_error_or_empty(document: bytes) -> None:
    try:
        found, _ = jwks.parse_keys(document)
    except ValueError:
        return
    assert found == {}
