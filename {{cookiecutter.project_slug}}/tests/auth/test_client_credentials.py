"""Calls to another service with a token: client credentials over real sockets."""

import asyncio
import contextlib
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Literal

import pytest

from app.outbound import client_credentials, http_client
from app.outbound.circuit_breaker import CircuitBreaker, CircuitOpenError
from app.outbound.client_credentials import ClientCredentials
from app.outbound.http_client import UpstreamClient, UpstreamError
from tests.auth.provider import TOKEN, Provider, Trouble
from tests.outbound.test_http_client import Handler, Upstream, respond, run_upstream
from tests.patience import patience

SECRET = "secret-1"
PATIENT_SECONDS = 30.0
NEVER = float("-inf")


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may need seconds for a response."""
    monkeypatch.setattr(http_client, "ATTEMPT_SECONDS", PATIENT_SECONDS)
    monkeypatch.setattr(http_client, "DEADLINE_SECONDS", PATIENT_SECONDS)


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    """The service that is called. It accepts every token."""
    with run_upstream() as server:
        yield server


@pytest.fixture
async def tokens(provider: Provider) -> AsyncIterator[ClientCredentials]:
    parameters = {"scope": "bills:write", "audience": "billing"}
    async with contextlib.aclosing(
        ClientCredentials("test-token", provider.token_url, "client-1", SECRET, parameters)
    ) as tokens:
        yield tokens


@pytest.fixture
async def client(upstream: Upstream, tokens: ClientCredentials) -> AsyncIterator[UpstreamClient]:
    url = f"http://127.0.0.1:{upstream.server_port}"
    client = UpstreamClient("test", url, CircuitBreaker("test", 100), tokens=tokens)
    async with contextlib.aclosing(client):
        yield client


async def eventually(condition: Callable[[], object]) -> None:
    async with patience(PATIENT_SECONDS):
        while not condition():  # noqa: ASYNC110 - of another thread
            await asyncio.sleep(0.01)


def sent_tokens(upstream: Upstream) -> list[str]:
    """Return the tokens of the requests, in their order."""
    assert all(header.startswith("Bearer ") for header in upstream.authorizations)
    return [header.removeprefix("Bearer ") for header in upstream.authorizations]


def expire(tokens: ClientCredentials) -> None:
    tokens.renew_at = NEVER
    tokens.stop_at = NEVER


async def test_one_token_serves_all_requests(
    provider: Provider, upstream: Upstream, client: UpstreamClient
) -> None:
    """RFC 6749, section 4.4; RFC 6750, section 2.1."""
    for _ in range(3):
        assert (await client.request("POST", "bills", {})).status == 200
    assert sent_tokens(upstream) == provider.issued_tokens * 3
    (request,) = provider.token_requests
    expected = {"grant_type": "client_credentials", "scope": "bills:write", "audience": "billing"}
    assert request == (expected, "client-1", "basic")


async def test_concurrent_requests_wait_for_one_token(
    provider: Provider, upstream: Upstream, client: UpstreamClient
) -> None:
    """A caller that gives up does not take the token from the others."""
    with provider.trouble(Trouble.FROZEN):
        calls = [asyncio.create_task(client.request("GET", "/", {})) for _ in range(20)]
        await eventually(lambda: provider.fetches[TOKEN])
        calls[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await calls[0]
    responses = await asyncio.gather(*calls[1:])
    assert {response.status for response in responses} == {200}
    assert provider.fetches[TOKEN] == 1
    assert len(upstream.requests) == 19


async def test_token_is_renewed_in_the_background(
    provider: Provider, upstream: Upstream, client: UpstreamClient, tokens: ClientCredentials
) -> None:
    """While the provider does not respond, calls go on with the old token."""
    await client.request("GET", "/", {})
    with provider.trouble(Trouble.FROZEN):
        tokens.renew_at = NEVER
        for _ in range(3):
            await client.request("GET", "/", {})
        await eventually(lambda: provider.fetches[TOKEN] == 2)
    await eventually(lambda: len(provider.issued_tokens) == 2 and tokens.fetching is None)
    await client.request("GET", "/", {})
    old, new = provider.issued_tokens
    assert sent_tokens(upstream) == [old, old, old, old, new]
    assert provider.fetches[TOKEN] == 2


async def test_failed_renewal_is_repeated_at_intervals_and_fails_no_call(
    provider: Provider,
    upstream: Upstream,
    client: UpstreamClient,
    tokens: ClientCredentials,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await client.request("GET", "/", {})
    tokens.renew_at = NEVER
    provider.clients.clear()
    for _ in range(5):
        await client.request("GET", "/", {})
        await eventually(lambda: tokens.fetching is None)
    assert provider.fetches[TOKEN] == 2
    provider.clients["client-1"] = SECRET
    tokens.failed_at = NEVER
    await client.request("GET", "/", {})
    await eventually(lambda: provider.fetches[TOKEN] == 3 and tokens.fetching is None)
    await client.request("GET", "/", {})
    assert sent_tokens(upstream)[-1] == provider.issued_tokens[1]
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["no new token: invalid_client: 401", "new token"]


async def test_lifetime_decides_when_a_token_is_renewed(
    provider: Provider, tokens: ClientCredentials
) -> None:
    """Until 75 % of it the token is used as it is, and after 95 % no more."""
    provider.expires_in = 1000
    start = time.monotonic()
    await tokens.token()
    end = time.monotonic()
    assert start + 750 <= tokens.renew_at <= end + 750
    assert start + 950 <= tokens.stop_at <= end + 950


async def test_expired_token_is_not_sent(
    provider: Provider, upstream: Upstream, client: UpstreamClient, tokens: ClientCredentials
) -> None:
    await client.request("GET", "/", {})
    expire(tokens)
    await client.request("GET", "/", {})
    assert sent_tokens(upstream) == provider.issued_tokens
    assert len(provider.issued_tokens) == 2


def rejecting(provider: Provider) -> Callable[[Handler], None]:
    """Return a behavior: 401 to the first token, which was revoked."""

    def answer(request: Handler) -> None:
        is_revoked = request.headers["Authorization"].endswith(provider.issued_tokens[0])
        respond(request, 401 if is_revoked else 201)

    return answer


async def test_401_leads_to_one_new_token_and_one_retry(
    provider: Provider, upstream: Upstream, client: UpstreamClient
) -> None:
    """Also of a POST without a key, since a service that responds 401 has done nothing."""
    upstream.respond = rejecting(provider)
    calls = [client.request("POST", "/", {}) for _ in range(10)]
    responses = await asyncio.gather(*calls)
    assert {response.status for response in responses} == {201}
    assert provider.fetches[TOKEN] == 2
    assert len(upstream.requests) == 20


async def test_service_that_rejects_every_token_causes_few_requests_to_the_provider(
    provider: Provider, upstream: Upstream, client: UpstreamClient
) -> None:
    upstream.respond = lambda request: respond(request, 401)
    for _ in range(5):
        assert (await client.request("POST", "/", {})).status == 401
    assert provider.fetches[TOKEN] == 2
    assert len(upstream.requests) == 6


async def fails(call: Awaitable[object]) -> str:
    """Return the error of a call, as a traceback in a log would show it."""
    with pytest.raises((UpstreamError, CircuitOpenError)) as failed:
        await call
    return "".join(traceback.format_exception(failed.value))


@pytest.mark.parametrize("trouble", Trouble)
async def test_provider_in_trouble_fails_calls_in_bounded_time(
    provider: Provider,
    upstream: Upstream,
    client: UpstreamClient,
    monkeypatch: pytest.MonkeyPatch,
    trouble: Trouble,
) -> None:
    """With the usual error, and the service is not called without a token."""
    monkeypatch.setattr(http_client, "DEADLINE_SECONDS", 0.5)
    with provider.trouble(trouble):
        start = time.monotonic()
        await fails(client.request("GET", "/", {}))
        assert time.monotonic() - start < PATIENT_SECONDS / 2
    assert upstream.requests == []
    # Not the target of a redirect, which would get the secret
    assert set(provider.fetches) == {TOKEN}


async def test_calls_recover_with_the_provider(
    provider: Provider, client: UpstreamClient, tokens: ClientCredentials
) -> None:
    with provider.trouble(Trouble.CUT):
        await fails(client.request("GET", "/", {}))
    tokens.failed_at = NEVER
    assert (await client.request("GET", "/", {})).status == 200


async def test_invalid_secret_fails_calls_without_a_request_for_each(
    provider: Provider, upstream: Upstream, client: UpstreamClient, caplog: pytest.LogCaptureFixture
) -> None:
    provider.clients.clear()
    for _ in range(5):
        text = await fails(client.request("GET", "/", {}))
        assert "test-token" in text
    assert provider.fetches[TOKEN] == 1
    assert upstream.requests == []
    (record,) = caplog.records
    assert record.getMessage() == "no new token: invalid_client: 401"
    assert record.__dict__["upstream"] == "test-token"


@pytest.mark.parametrize("trouble", [None, *Trouble])
async def test_secrets_are_in_no_log_and_no_error(
    provider: Provider,
    upstream: Upstream,
    client: UpstreamClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trouble: Trouble | None,
) -> None:
    """Not at any level, and not if provider or service fail half-way."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(http_client, "DEADLINE_SECONDS", 0.5)
    upstream.respond = lambda request: respond(request, 503)
    text = ""
    with provider.trouble(trouble, TOKEN) if trouble else contextlib.nullcontext():
        text = await fails(client.request("GET", "/", {}))
    text += caplog.text + "".join(str(record.__dict__) for record in caplog.records)
    for secret in [SECRET, client.tokens.headers["Authorization"], *provider.issued_tokens]:  # type: ignore[union-attr]
        assert secret.removeprefix("Basic ") not in text


async def test_token_does_not_follow_a_redirect(upstream: Upstream, client: UpstreamClient) -> None:
    with run_upstream() as elsewhere:
        location = f"http://127.0.0.1:{elsewhere.server_port}/"
        upstream.respond = lambda request: respond(request, 307, Location=location)
        assert (await client.request("POST", "/", {})).status == 307
    assert elsewhere.requests == []


@pytest.mark.parametrize("method", ["basic", "post"])
async def test_client_authenticates_by_either_method(
    provider: Provider, method: Literal["basic", "post"]
) -> None:
    """RFC 6749, section 2.3.1: form-encoded, in the header or in the body."""
    provider.clients["a b"] = "p:ß&="
    provider.methods = {method}
    tokens = ClientCredentials("test-token", provider.token_url, "a b", "p:ß&=", method=method)
    async with contextlib.aclosing(tokens):
        assert await tokens.token() == provider.issued_tokens[0]


async def test_path_of_the_token_url_is_kept(provider: Provider) -> None:
    """Some providers require the slash at its end."""
    tokens = ClientCredentials("test-token", provider.issuer + "/a/token/", "client-1", SECRET)
    async with contextlib.aclosing(tokens):
        await fails(tokens.token())
    assert provider.fetches == {"/a/token/": 1}


@pytest.mark.parametrize(
    ("value", "seconds"), [(60, 60), ("3600", 3600), (None, 300), (1e300, 86_400), (0.5, 0.5)]
)
async def test_lifetime_of_the_provider_is_used(
    provider: Provider, tokens: ClientCredentials, value: object, seconds: float
) -> None:
    """RFC 6749, section 5.1, recommends `expires_in`; a day is the longest."""
    provider.token_response["expires_in"] = value
    start = time.monotonic()
    await tokens.token()
    assert tokens.stop_at - start == pytest.approx(seconds * client_credentials.STOP_AT, abs=5)


@pytest.mark.parametrize(
    "changes",
    [
        {"access_token": None},
        {"access_token": ""},
        {"access_token": 1},
        {"access_token": "a b"},
        {"access_token": "a\r\nX-Injected: 1"},
        {"access_token": "ä"},
        {"token_type": None},
        {"token_type": "DPoP"},
        {"expires_in": 0},
        {"expires_in": -1},
        {"expires_in": "NaN"},
        {"expires_in": "soon"},
        {"expires_in": True},
        {"expires_in": [1]},
    ],
    ids=str,
)
async def test_invalid_token_response_is_a_failure(
    provider: Provider, tokens: ClientCredentials, changes: dict[str, object]
) -> None:
    """RFC 6749, section 5.1; RFC 6750, section 2.1."""
    provider.token_response = changes
    assert "invalid token response" in await fails(tokens.token())


async def test_close_ends_a_request_in_progress(provider: Provider) -> None:
    tokens = ClientCredentials("test-token", provider.token_url, "client-1", SECRET)
    with provider.trouble(Trouble.FROZEN):
        waiting = asyncio.create_task(tokens.token())
        await eventually(lambda: provider.fetches[TOKEN])
        async with patience(PATIENT_SECONDS):
            await tokens.aclose()
            with pytest.raises(asyncio.CancelledError):
                await waiting
