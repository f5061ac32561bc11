"""Requests with tokens that must not be believed, over sockets: RFC 8725, RFC 9068, RFC 6750.

And what their clients see. One service serves all of them.
"""

import itertools
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from scripts.dev_services import Redis
from tests.auth import tokens
from tests.auth.provider import DISCOVERY, ELSEWHERE, JWKS, Provider, Trouble, running_provider
from tests.auth.tokens import AUDIENCE, MISSING, SigningKey, hmac_with, signing_key, unsigned
from tests.documented_metrics import assert_documented
from tests.otlp_receiver import Receiver, receiving
from tests.service_process import Service, eventually, serving
from tests.serving.raw_http import CLOSE, headers_of, send

APP = "tests.auth.auth_routes:app"
OPEN_PATHS = ["/", "/health/live", "/health/startup", "/health/ready"]
#: As in auth_routes.py, which changes the module of the keys, so it is not imported here.
COOL_DOWN_SECONDS = 0.5
_numbers = itertools.count()


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    with running_provider() as provider:
        yield provider


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def service(
    provider: Provider, receiver: Receiver, database_url: str, redis: Redis
) -> Iterator[Service]:
    variables = {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis.url,
        "WEB_CONCURRENCY": "1",
        "ACCESS_LOG_FLUSH_MS": "0",
        "AUTH_ISSUER": provider.issuer,
        "AUTH_AUDIENCE": AUDIENCE,
        "SERVICE_NAME": "orders",
        "DOCS_ENABLED": "true",
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
        "OTEL_BSP_SCHEDULE_DELAY": "50",
    }
    with serving(APP, **variables) as running:
        running.wait()
        # The keys are known.
        eventually(lambda: call(running, provider.mint()).status_code == 200)
        yield running


def call(
    service: Service, token: str | None, path: str = "/mine", **headers: str
) -> httpx.Response:
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    return service.get(path, **headers)


def assert_invalid(response: httpx.Response, detail: str) -> None:
    """Check a 401 with the error code of RFC 6750, section 3.1."""
    assert response.status_code == 401, response.text
    problem = response.json()
    assert problem["code"] == "invalid_token"
    assert problem["detail"] == detail
    assert "principal" not in problem
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["www-authenticate"] == (
        f'Bearer realm="orders", error="invalid_token", error_description="{detail}"'
    )


def cool_down() -> None:
    """Let an unknown key be fetched again."""
    time.sleep(COOL_DOWN_SECONDS)


@pytest.mark.parametrize("algorithm", tokens.ALGORITHMS)
def test_valid_token_is_accepted(service: Service, provider: Provider, algorithm: str) -> None:
    token = provider.mint(signing_key(algorithm), scope="b a", client_id="app-1")
    expected = {"subject": "client-1", "client_id": "app-1", "scopes": ["a", "b"]}
    assert call(service, token).json() == expected
    assert call(service, token).json() == expected


def now(seconds: int) -> int:
    return int(time.time()) + seconds


Mint = Callable[[Provider], str]
VARIANTS: dict[str, Mint] = {
    "typ JWT": lambda p: p.mint(header={"typ": "JWT"}),
    "typ as a media type": lambda p: p.mint(header={"typ": "application/at+jwt"}),
    "no typ": lambda p: p.mint(header={"typ": MISSING}),
    "several audiences": lambda p: p.mint(aud=["other", AUDIENCE]),
    "scopes in a list": lambda p: p.mint(scope=["a", "b"]),
    "expired within the leeway": lambda p: p.mint(exp=now(-10)),
    "not yet valid within the leeway": lambda p: p.mint(nbf=now(10)),
    "no iat": lambda p: p.mint(iat=MISSING),
    "unknown header": lambda p: p.mint(header={"unknown": "ignored"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_providers_are_accepted(
    service: Service, provider: Provider, variant: str
) -> None:
    """Unknown headers are ignored (RFC 7515, section 4)."""
    assert call(service, VARIANTS[variant](provider)).status_code == 200


def forged(provider: Provider, **header: object) -> str:
    """Return a token that is signed by another key than the issuer's, of a known ID."""
    other = signing_key("RS256", "attacker")
    return provider.mint(other, header={"kid": "rs256", **header})


def nested(provider: Provider) -> str:
    """Return a token within a signed token (RFC 7519, section 5.2)."""
    header = {"alg": "RS256", "cty": "JWT", "kid": "rs256"}
    return tokens.encode(header, provider.mint(), RS256.sign)


UNREADABLE = "The token cannot be read."
WRONG_ALGORITHM = "The algorithm of the token is not accepted."
WRONG_SIGNATURE = "The signature of the token is not valid."
WRONG_TYPE = "This is not an access token."
UNKNOWN_KEY = "The key of the token is not the issuer's."
KEY_OF_OTHER_ALGORITHM = "The key of the token is for another algorithm."
RS256 = signing_key("RS256")
ATTACKS: dict[str, tuple[Mint, str]] = {
    "alg none": (lambda p: p.mint(header={"alg": "none"}, sign=unsigned), WRONG_ALGORITHM),
    "alg none, other case": (
        lambda p: p.mint(header={"alg": "nOnE"}, sign=unsigned),
        WRONG_ALGORITHM,
    ),
    "no signature": (lambda p: p.mint(sign=unsigned), WRONG_SIGNATURE),
    "HS256 with the public key": (
        lambda p: p.mint(RS256, header={"alg": "HS256"}, sign=hmac_with(RS256.public_pem)),
        WRONG_ALGORITHM,
    ),
    "RSA key for ES256": (lambda p: p.mint(RS256, header={"alg": "ES256"}), KEY_OF_OTHER_ALGORITHM),
    "wrong issuer": (lambda p: p.mint(iss=f"{p.issuer}/"), "The token is another issuer's."),
    "wrong audience": (
        lambda p: p.mint(aud=["orders", AUDIENCE.upper()]),
        "The token is for another service.",
    ),
    "no audience": (lambda p: p.mint(aud=MISSING), "The token is for another service."),
    "expired": (lambda p: p.mint(exp=now(-120)), "The token has expired."),
    "not yet valid": (lambda p: p.mint(nbf=now(300)), "The token is not valid yet."),
    "of the future": (lambda p: p.mint(iat=now(300)), "The token is not valid yet."),
    "no expiry": (lambda p: p.mint(exp=MISSING), "The token has no valid exp."),
    "expiry is a text": (lambda p: p.mint(exp="9999999999"), "The token has no valid exp."),
    "expiry is true": (lambda p: p.mint(exp=True), "The token has no valid exp."),
    "no subject": (lambda p: p.mint(sub=MISSING), "The token has no valid sub."),
    "subject with NUL": (lambda p: p.mint(sub="a\0b"), "The token has no valid sub."),
    "subject of 256 characters": (lambda p: p.mint(sub="a" * 256), "The token has no valid sub."),
    "nested token": (lambda p: nested(p), UNREADABLE),
    "no algorithm": (lambda p: p.mint(header={"alg": MISSING}), UNREADABLE),
    "algorithm is a list": (lambda p: p.mint(header={"alg": ["RS256"]}), WRONG_ALGORITHM),
    "kid with a surrogate": (lambda p: p.mint(header={"kid": "\ud800"}), UNKNOWN_KEY),
    "token of a logout": (lambda p: p.mint(header={"typ": "logout+jwt"}), WRONG_TYPE),
    "type is a number": (lambda p: p.mint(header={"typ": 1}), WRONG_TYPE),
    "crit": (lambda p: p.mint(header={"crit": ["exp"], "exp": 1}), UNREADABLE),
    "crit and b64": (lambda p: p.mint(header={"crit": ["b64"], "b64": False}), UNREADABLE),
    "forged": (forged, WRONG_SIGNATURE),
    "jwk": (lambda p: forged(p, jwk=signing_key("RS256", "attacker").jwk), WRONG_SIGNATURE),
    "jku": (lambda p: forged(p, jku=f"{p.issuer}/attack"), WRONG_SIGNATURE),
    "x5u": (lambda p: forged(p, x5u=f"{p.issuer}/attack"), WRONG_SIGNATURE),
    "kid with a path": (lambda p: p.mint(header={"kid": "../../../dev/null"}), UNKNOWN_KEY),
    "kid with SQL": (lambda p: p.mint(header={"kid": "x' union select 'k'--"}), UNKNOWN_KEY),
    "kid is a list": (lambda p: p.mint(header={"kid": ["rs256"]}), UNREADABLE),
    "no kid, several keys": (lambda p: p.mint(header={"kid": MISSING}), UNKNOWN_KEY),
    "100 kB": (lambda p: p.mint(padding="x" * 17_000), "The token is too large."),
    "claims are a list": (lambda p: tokens.encode({"alg": "RS256"}, [], RS256.sign), UNKNOWN_KEY),
    "header is a list": (lambda p: tokens.encode([], {}, RS256.sign), UNREADABLE),
    "two parts": (lambda p: p.mint().rpartition(".")[0], UNREADABLE),
    "encrypted": (lambda p: "a.b.c.d.e", UNREADABLE),
    "two dots": (lambda p: "..", UNREADABLE),
    "deeply nested": (lambda p: f"{tokens.to_base64(b'[' * 9000)}.e30.AAAA", UNREADABLE),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_is_rejected_with_401(service: Service, provider: Provider, attack: str) -> None:
    mint, detail = ATTACKS[attack]
    assert_invalid(call(service, mint(provider)), detail)
    assert provider.fetches.keys() <= {DISCOVERY, JWKS}, "something was fetched for a token"


def test_rejected_header_of_100_kb_is_431(service: Service, provider: Provider) -> None:
    """It is larger than `MAX_HEADER_BYTES`, so no token is looked at."""
    token = provider.mint(padding="x" * 100_000)
    request = f"GET /mine HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n\r\n"
    assert headers_of(send(service, request.encode()))[0].startswith(b"http/1.1 431")


def test_two_authorization_headers_are_400(service: Service, provider: Provider) -> None:
    """RFC 6750, section 3.1: more than one method of including a token."""
    field = f"Authorization: Bearer {provider.mint()}\r\n".encode()
    request = b"GET /mine HTTP/1.1\r\nHost: a\r\n" + CLOSE + field * 2 + b"\r\n"
    response = send(service, request)
    status, *headers = headers_of(response)
    assert status.startswith(b"http/1.1 400")
    assert any(b'error="invalid_request"' in header for header in headers)
    assert b'"code":"invalid_request"' in response


def test_token_in_the_query_is_not_accepted(service: Service, provider: Provider) -> None:
    """RFC 9700, section 2.6. Without another token it counts as none."""
    token = provider.mint()
    response = call(service, None, f"/mine?access_token={token}")
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == 'Bearer realm="orders"'
    response = call(service, token, f"/mine?access_token={token}")
    assert (response.status_code, response.json()["code"]) == (400, "invalid_request")


@pytest.mark.parametrize("header", [{}, {"Authorization": "Basic YTpi"}, {"Authorization": "x"}])
def test_missing_token_is_401_without_an_error_code(
    service: Service, header: dict[str, str]
) -> None:
    """RFC 6750, section 3.1."""
    response = service.get("/mine", **header)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == 'Bearer realm="orders"'


def test_probes_and_root_are_open_and_all_else_is_not(service: Service, provider: Provider) -> None:
    assert {service.get(path).status_code for path in OPEN_PATHS} == {200}
    for path in ("/mine", "/mine/written", "/mine/bug"):
        assert service.get(path).status_code == 401
    assert service.http.post("/mine/body", json={"a": 1}).status_code == 401
    headers = {"Authorization": f"Bearer {provider.mint()}"}
    response = service.http.post("/mine/body", json={"a": 1}, headers=headers)
    assert response.json() == {"a": 1}
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    assert service.get("/mine/socket", **upgrade).status_code == 401
    with service.websocket("/mine/socket", **headers):
        pass


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("HEAD", "/mine", 401),
        ("HEAD", "/mine/written", 401),
        ("GET", "/mine?a=b", 401),
        ("POST", "/mine", 405),
        ("OPTIONS", "/mine", 405),
        ("GET", "/mine/", 307),
        ("GET", "/nothing", 404),
        ("GET", "/mine/stream", 401),
    ],
)
def test_each_method_of_a_route_requires_a_token(
    service: Service, method: str, path: str, status: int
) -> None:
    """A response without a token shows which routes there are, as the API document does."""
    response = service.http.request(method, path)
    assert response.status_code == status
    assert b"secret" not in response.content


def test_stream_requires_a_token_at_its_start(service: Service, provider: Provider) -> None:
    assert call(service, provider.mint(), "/mine/stream").text == "secret"


def test_missing_scope_is_403_with_the_scopes(service: Service, provider: Provider) -> None:
    """RFC 6750, section 3.1."""
    path = "/mine/written"
    response = call(service, provider.mint(scope="orders:write other"), path)
    assert response.status_code == 403
    assert response.json()["code"] == "insufficient_scope"
    challenge = response.headers["www-authenticate"]
    assert challenge.startswith('Bearer realm="orders", error="insufficient_scope", ')
    assert challenge.endswith(', scope="orders:read orders:write"')
    token = provider.mint(scope="orders:write orders:read")
    assert call(service, token, path).json() == "written"


def test_scheme_is_case_insensitive(service: Service, provider: Provider) -> None:
    """RFC 9110, section 11.1."""
    headers = {"Authorization": f"bEARER {provider.mint()}"}
    assert service.get("/mine", **headers).status_code == 200


def test_document_has_the_security_scheme(service: Service, provider: Provider) -> None:
    """So the Authorize button of /docs works, which loads it without a token."""
    assert service.get("/docs").status_code == 200
    document = service.get("/openapi.json").json()
    assert document["components"]["securitySchemes"] == {
        "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
    }
    required = document["paths"]["/mine/written"]["get"]["security"]
    assert sorted(required[0]["bearer"]) == ["orders:read", "orders:write"]
    assert document["paths"]["/mine"]["get"]["security"] == [{"bearer": []}]
    assert "security" not in document["paths"]["/health/live"]["get"]
    assert document["paths"]["/mine"]["get"]["responses"].keys() >= {"400", "401", "403", "503"}


def test_principal_is_in_log_lines_hashed(service: Service, provider: Provider) -> None:
    for path in ("/mine", "/mine/bug"):
        call(service, provider.mint(sub="ada@acme.example"), path, **{"X-Request-ID": f"log{path}"})

    def lines() -> list[dict[str, Any]]:
        return [line for line in service.lines if line.get("request_id", "")[:3] == "log"]

    eventually(lambda: len(lines()) >= 3)
    assert {line["logger"] for line in lines()} >= {"access", "app.observe"}
    (principal,) = {line["principal"] for line in lines()}
    assert re.fullmatch(r"[0-9a-f]{16}", principal)
    assert "ada@acme.example" not in service.text
    assert "ada@acme.example" not in service.metrics()


def test_flood_of_unknown_keys_costs_one_fetch_per_cool_down(
    service: Service, provider: Provider
) -> None:
    cool_down()
    before = provider.fetches[JWKS]
    start = time.monotonic()
    invented = [provider.mint(header={"kid": f"invented-{next(_numbers)}"}) for _ in range(40)]
    responses = [call(service, token) for token in invented]
    seconds = time.monotonic() - start
    # 503 while a fetch fails, such as on a busy machine: then nobody knows whether the key exists.
    rejected = [response for response in responses if response.status_code != 503]
    assert len(rejected) > 20
    for response in rejected:
        assert_invalid(response, UNKNOWN_KEY)
    assert 1 <= provider.fetches[JWKS] - before <= 1 + seconds / COOL_DOWN_SECONDS


def test_rotated_key_is_known_with_its_first_token(service: Service, provider: Provider) -> None:
    key = rotated(provider)
    cool_down()
    assert call(service, provider.mint(key)).status_code == 200
    provider.revoke(key.kid)


def rotated(provider: Provider) -> SigningKey:
    key = signing_key("ES256", f"rotated-{next(_numbers)}")
    provider.rotate(key)
    return key


def test_revoked_key_is_rejected_after_its_grace(service: Service, provider: Provider) -> None:
    """The grace is what `Cache-Control` allows. Remembered tokens are forgotten too."""
    provider.cache_control = "max-age=1"
    key = rotated(provider)
    token = provider.mint(key)
    cool_down()
    assert call(service, token).status_code == 200
    provider.revoke(key.kid)
    assert call(service, token).status_code == 200
    eventually(lambda: call(service, token).status_code == 401)
    assert_invalid(call(service, token), UNKNOWN_KEY)
    provider.cache_control = "max-age=300"
    before = provider.fetches[JWKS]
    eventually(lambda: provider.fetches[JWKS] > before)


def test_weak_key_of_the_provider_is_not_used(service: Service, provider: Provider) -> None:
    """RSA of 512 bits can be factored within hours."""
    weak = tokens.weak_key()
    provider.other_keys = [weak.jwk]
    cool_down()
    assert_invalid(call(service, provider.mint(weak)), UNKNOWN_KEY)
    provider.other_keys = []
    message = "unusable keys of the issuer: 'weak': RSA of 512 bits"
    eventually(lambda: message in service.messages)


@pytest.mark.parametrize("trouble", Trouble)
def test_provider_in_trouble_changes_nothing_for_known_keys(
    service: Service, provider: Provider, trouble: Trouble
) -> None:
    """Unknown ones are 503 with `Retry-After`; readiness stays. A redirect is not followed."""
    with provider.trouble(trouble):
        cool_down()
        unknown = call(service, provider.mint(header={"kid": f"invented-{next(_numbers)}"}))
        assert unknown.status_code == 503, unknown.text
        assert int(unknown.headers["Retry-After"]) >= 1
        assert unknown.json()["detail"] == "The keys of the identity provider are not known."
        assert call(service, provider.mint()).status_code == 200
        assert service.get("/health/ready").status_code == 200
    assert not any(path.startswith(ELSEWHERE) for path in provider.fetches)
    key = rotated(provider)
    eventually(lambda: call(service, provider.mint(key)).status_code == 200)
    provider.revoke(key.kid)


def test_worker_that_starts_while_the_provider_hangs_knows_the_keys(
    service: Service, provider: Provider
) -> None:
    """They are shared in the pod: workers are replaced after `MAX_REQUESTS`."""
    (worker,) = (line["pid"] for line in service.lines if "Started server" in line["message"])
    with provider.trouble(Trouble.FROZEN):
        os.kill(worker, signal.SIGKILL)
        service.wait_for_workers(2)
        eventually(lambda: service.get("/health/ready").status_code == 200)
        assert call(service, provider.mint()).status_code == 200


def test_rejections_and_the_age_of_keys_are_documented_metrics(
    service: Service, provider: Provider
) -> None:
    service.get("/mine")
    call(service, provider.mint(exp=now(-120)))
    call(service, provider.mint(), "/mine/written")
    metrics = service.metrics()
    assert_documented(metrics)
    for reason in ("missing", "expired", "scope"):
        name = f'reason="{reason}"'
        value = re.search("auth_rejected_requests_total{" + name + r"} (\S+)", metrics)
        assert value is not None, reason
        assert float(value[1]) >= 1
    fetched = re.search(r"^auth_keys_fetched_timestamp_seconds (\S+)", metrics, re.MULTILINE)
    assert fetched is not None
    assert time.time() - 60 < float(fetched[1]) <= time.time()


def test_no_token_is_in_the_output(
    service: Service, provider: Provider, receiver: Receiver
) -> None:
    """The last test: neither the tokens of the others, nor parts of them, in logs or traces."""
    call(service, provider.mint(), "/mine/bug", **{"X-Request-ID": "last"})
    eventually(lambda: any(line.get("request_id") == "last" for line in service.lines))
    spans = receiver.wait(lambda spans: any(span.name == "GET /mine/bug" for span in spans))
    traces = "".join(span.wire for span in spans)
    payload = json.dumps({"iss": provider.issuer})[:-1]
    for output in (service.text, service.metrics(), traces):
        assert "eyJ" not in output  # the start of each header: `{"`
        assert tokens.to_base64(payload.encode())[:20] not in output
