"""Payments with authentication: who may create them, and who may read them."""

from collections.abc import AsyncIterator, Iterator
from uuid import UUID, uuid4

import pytest
from httpx import Response

from app.main import create_app
from app.settings import Settings
from tests.auth.provider import Provider, running_provider
from tests.auth.tokens import AUDIENCE
from tests.conftest import InProcess
from tests.streams import Client

NEW = {"amount": 1250, "currency": "EUR", "reference": "auth"}
ROUTES = [
    ("POST", "/payments", "payments:write", 201),
    ("GET", "/payments", "payments:read", 200),
    ("GET", "/payments/totals", "payments:read", 200),
    ("GET", f"/payments/{UUID(int=1)}", "payments:read", 404),
]


@pytest.fixture
def provider() -> Iterator[Provider]:
    with running_provider() as provider:
        yield provider


@pytest.fixture
async def client(settings: Settings, provider: Provider) -> AsyncIterator[Client]:
    trust = {
        "auth_issuer": provider.issuer,
        "auth_audience": AUDIENCE,
        "auth_jwks_url": provider.jwks_url,
    }
    async with InProcess(create_app(settings.model_copy(update=trust))) as client:
        yield client


def bearer(provider: Provider, scope: str, subject: str = "client-1") -> dict[str, str]:
    return {"Authorization": f"Bearer {provider.mint(scope=scope, sub=subject)}"}


@pytest.mark.parametrize(("method", "path", "scope", "status"), ROUTES)
async def test_each_route_requires_its_scope(
    client: Client, provider: Provider, method: str, path: str, scope: str, status: int
) -> None:
    """RFC 6750, section 3: 401 without a token, 403 with one that lacks the scope."""
    json = NEW if method == "POST" else None
    key = {"Idempotency-Key": str(uuid4())}

    async def send(headers: dict[str, str]) -> Response:
        return await client.request(method, path, json=json, headers=headers | key)

    response = await send({})
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"].startswith("Bearer ")
    (other,) = {"payments:read", "payments:write"} - {scope}
    response = await send(bearer(provider, other))
    assert response.status_code == 403
    assert f'scope="{scope}"' in response.headers["WWW-Authenticate"]
    assert (await send(bearer(provider, scope))).status_code == status


async def test_idempotency_key_is_the_callers_own(client: Client, provider: Provider) -> None:
    key = {"Idempotency-Key": str(uuid4())}
    found = []
    for subject in ("alice", "bob", "alice"):
        headers = bearer(provider, "payments:write", subject) | key
        found.append((await client.post("/payments", json=NEW, headers=headers)).json())
    assert found[0] == found[2]
    assert found[0]["payment_id"] != found[1]["payment_id"]


def test_api_document_lists_the_scopes(provider: Provider) -> None:
    """OpenAPI 3.1, "Security Requirement Object"."""
    settings = Settings(
        environment="development", auth_issuer=provider.issuer, auth_audience=AUDIENCE
    )
    document = create_app(settings).openapi()
    for method, path, _, _ in ROUTES[:3]:
        operation = document["paths"][path][method.lower()]
        assert operation["security"]
        assert {"401", "403"} <= set(operation["responses"])
