"""The provider of these tests: what it publishes verifies what it signs."""

import base64
import json
from urllib.parse import quote_plus

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from tests.auth import tokens
from tests.auth.provider import (
    DISCOVERY,
    ELSEWHERE,
    JWKS,
    OVERSIZED_BYTES,
    TOKEN,
    Provider,
    Trouble,
    running_provider,
)

GRANT = {"grant_type": "client_credentials"}


def decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def number(text: str) -> int:
    return int.from_bytes(decode(text))


def verify(token: str, jwk: dict[str, str]) -> dict[str, object]:
    """Return the claims. Raises `InvalidSignature`."""
    data, _, signature = token.rpartition(".")
    raw = decode(signature)
    if jwk["kty"] == "RSA":
        public = rsa.RSAPublicNumbers(number(jwk["e"]), number(jwk["n"])).public_key()
        public.verify(raw, data.encode(), padding.PKCS1v15(), SHA256())
    elif jwk["kty"] == "EC":
        curve = ec.SECP256R1()
        point = ec.EllipticCurvePublicNumbers(number(jwk["x"]), number(jwk["y"]), curve)
        numbers = int.from_bytes(raw[:32]), int.from_bytes(raw[32:])
        encoded = encode_dss_signature(*numbers)
        point.public_key().verify(encoded, data.encode(), ec.ECDSA(SHA256()))
    else:
        key = ed25519.Ed25519PublicKey.from_public_bytes(decode(jwk["x"]))
        key.verify(raw, data.encode())
    claims: dict[str, object] = json.loads(decode(data.partition(".")[2]))
    return claims


@pytest.mark.parametrize("algorithm", tokens.ALGORITHMS)
def test_published_keys_verify_the_tokens(provider: Provider, algorithm: str) -> None:
    key = tokens.signing_key(algorithm)
    discovery = httpx.get(provider.issuer + DISCOVERY).json()
    assert discovery["issuer"] == provider.issuer
    response = httpx.get(discovery["jwks_uri"])
    assert response.headers["Cache-Control"] == "max-age=300"
    (jwk,) = [jwk for jwk in response.json()["keys"] if jwk["kid"] == key.kid]
    claims = verify(provider.mint(key, scope="a b", aud=tokens.MISSING), jwk)
    assert claims["iss"] == provider.issuer
    assert claims["scope"] == "a b"
    assert "aud" not in claims
    assert provider.fetches == {DISCOVERY: 1, JWKS: 1}


def test_weak_key_signs() -> None:
    """The public operation of RSA returns the padded digest: RFC 8017, section 8.2.2."""
    key = tokens.weak_key()
    signature = decode(tokens.mint(key).rpartition(".")[2])
    assert number(key.jwk["n"]).bit_length() == 512
    opened = pow(int.from_bytes(signature), 65537, number(key.jwk["n"]))
    assert opened.to_bytes(64).startswith(b"\0\1\xff")


def test_rotated_and_revoked_keys_are_published_so(provider: Provider) -> None:
    provider.rotate(tokens.signing_key("ES256", "new"))
    provider.revoke("rs256")
    kids = [jwk["kid"] for jwk in httpx.get(provider.jwks_url).json()["keys"]]
    assert kids == ["new", "es256", "eddsa"]


@pytest.mark.parametrize("method", ["basic", "post"])
def test_clients_get_tokens(provider: Provider, method: str) -> None:
    """RFC 6749, sections 2.3.1 and 4.4.3: the credentials are form-encoded in both ways."""
    provider.clients["a b"] = "p:ß"
    form = {**GRANT, "scope": "orders:write"}
    if method == "basic":
        # httpx would encode them as UTF-8 alone
        login = f"{quote_plus('a b')}:{quote_plus('p:ß')}".encode()
        headers = {"Authorization": f"Basic {base64.b64encode(login).decode()}"}
        response = httpx.post(provider.token_url, data=form, headers=headers)
    else:
        form |= {"client_id": "a b", "client_secret": "p:ß"}
        response = httpx.post(provider.token_url, data=form)
    assert response.status_code == 200
    assert response.headers["Cache-Control"] == "no-store"
    assert response.json()["expires_in"] == 300
    assert response.json()["access_token"] == provider.issued_tokens[0]
    (request,) = provider.token_requests
    assert (request.client_id, request.method) == ("a b", method)
    assert request.form["scope"] == "orders:write"


def test_unknown_client_and_other_grants_get_errors(provider: Provider) -> None:
    """RFC 6749, section 5.2."""
    login = ("client-1", "wrong")
    response = httpx.post(provider.token_url, data=GRANT, auth=login)
    assert (response.status_code, response.json()["error"]) == (401, "invalid_client")
    form = {"grant_type": "password"}
    response = httpx.post(provider.token_url, data=form, auth=("client-1", "secret-1"))
    assert response.json() == {"error": "unsupported_grant_type"}
    assert provider.fetches[TOKEN] == 2
    assert provider.issued_tokens == []


def test_troubles_happen_during_their_block(provider: Provider) -> None:
    with provider.trouble(Trouble.ERROR, JWKS):
        assert httpx.get(provider.jwks_url).status_code == 500
        assert httpx.get(provider.issuer + DISCOVERY).status_code == 200
    with provider.trouble(Trouble.GARBAGE):
        assert b"html" in httpx.get(provider.jwks_url).content
    with provider.trouble(Trouble.OVERSIZED):
        response = httpx.get(provider.jwks_url)
        assert len(response.content) > OVERSIZED_BYTES
        assert response.json()["keys"]
    with provider.trouble(Trouble.REDIRECT):
        response = httpx.get(provider.jwks_url, follow_redirects=True)
        assert response.url.path == ELSEWHERE + JWKS
        assert response.json()["keys"]
    for trouble in (Trouble.FROZEN, Trouble.SLOW, Trouble.CUT):
        with provider.trouble(trouble), pytest.raises(httpx.TransportError):
            # SLOW keeps within the time limit of a read, so it reads a part only.
            read_a_part(provider.jwks_url)
    assert httpx.get(provider.jwks_url).status_code == 200


def read_a_part(url: str) -> None:
    with httpx.stream("GET", url, timeout=0.3) as response:
        assert response.status_code == 200
        length = int(response.headers["Content-Length"])
        if len(next(response.iter_raw())) < length:
            raise httpx.ReadTimeout("slow")


def test_stopped_provider_can_run_again_on_its_port() -> None:
    with running_provider() as first:
        port = first.server_port
    with pytest.raises(httpx.ConnectError):
        httpx.get(first.jwks_url)
    with running_provider(port) as second:
        assert httpx.get(second.jwks_url).json()["keys"]
        assert second.issuer == first.issuer
