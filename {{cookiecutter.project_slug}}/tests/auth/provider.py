"""A small OpenID provider over HTTP on the loopback interface, and what may go wrong with one.

It publishes keys (OpenID Connect Discovery 1.0, sections 3 and 4; RFC 7517), and issues tokens to
services (client credentials: RFC 6749, section 4.4).
"""

import base64
import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote_plus

from tests.auth.tokens import ALGORITHMS, SigningKey, mint, signing_key

DISCOVERY = "/.well-known/openid-configuration"
JWKS = "/jwks"
TOKEN = "/token"
#: Where a redirect leads to; it serves what the path itself does without trouble.
ELSEWHERE = "/elsewhere"
OVERSIZED_BYTES = 10 << 20
SLOW_BYTES_PER_SECOND = 20


class Trouble(Enum):
    """What goes wrong with each request to a path."""

    #: The connection is accepted, and nothing is ever sent.
    FROZEN = "frozen"
    #: A byte every 50 ms.
    SLOW = "slow"
    ERROR = "500"
    GARBAGE = "200 with a body that is not JSON"
    #: A JSON document of 10 MB.
    OVERSIZED = "oversized"
    #: 302 to `ELSEWHERE`, which has the document.
    REDIRECT = "redirect"
    #: The connection is closed without a response.
    CUT = "cut"


class TokenRequest(NamedTuple):
    """A request to the token endpoint: its form, and the client with its method."""

    form: dict[str, str]
    client_id: str
    #: `basic` or `post`: RFC 6749, section 2.3.1.
    method: str


class Response(NamedTuple):
    """A response with JSON."""

    status: int
    document: Any
    headers: Mapping[str, str]


class Provider(ThreadingHTTPServer):
    """A provider. Tests change its behavior while it runs, and count its requests."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.issuer = f"http://127.0.0.1:{self.server_port}"
        self.jwks_url = self.issuer + JWKS
        self.token_url = self.issuer + TOKEN
        self.lock = threading.Lock()

        # Observed
        #: Requests by path, whatever their outcome.
        self.fetches: Counter[str] = Counter()
        #: The valid and invalid requests for tokens.
        self.token_requests: list[TokenRequest] = []
        self.issued_tokens: list[str] = []

        # Behavior
        #: The published keys. The first signs.
        self.keys: list[SigningKey] = [signing_key(algorithm) for algorithm in ALGORITHMS]
        #: Members of the JWKS that are no `SigningKey`, such as one for encryption.
        self.other_keys: list[Mapping[str, object]] = []
        #: `Cache-Control` of the keys; empty sends none.
        self.cache_control = "max-age=300"
        #: Members of the discovery document that differ; None removes one.
        self.metadata: dict[str, object] = {}
        #: The clients of the token endpoint, with their secrets.
        self.clients = {"client-1": "secret-1"}
        #: `expires_in` of a token response; None sends none.
        self.expires_in: float | None = 300
        #: Members of a token response that differ; None removes one.
        self.token_response: dict[str, object] = {}
        #: The methods by which clients may authenticate.
        self.methods = {"basic", "post"}
        #: What goes wrong, by path.
        self.troubles: dict[str, Trouble] = {}

    def mint(self, key: SigningKey | None = None, **changes: Any) -> str:
        """Return a token of this issuer; the arguments are those of `tokens.mint`."""
        return mint(key or self.keys[0], **{"iss": self.issuer, **changes})

    def rotate(self, key: SigningKey) -> None:
        """Sign with a new key. The others stay published, until they are revoked."""
        self.keys = [key, *self.keys]

    def revoke(self, kid: str) -> None:
        """Publish a key no longer."""
        self.keys = [key for key in self.keys if key.kid != kid]

    @contextlib.contextmanager
    def trouble(self, trouble: Trouble, *paths: str) -> Iterator[None]:
        """Have trouble with requests to the paths, or with all requests, during the block."""
        before = self.troubles
        self.troubles = before | dict.fromkeys(paths or (DISCOVERY, JWKS, TOKEN), trouble)
        try:
            yield
        finally:
            self.troubles = before

    def respond(self, path: str, headers: Mapping[str, str], body: str) -> Response:
        """Return the response to a request."""
        if path == DISCOVERY:
            return Response(200, self._discovery(), {})
        if path == JWKS:
            control = {"Cache-Control": self.cache_control} if self.cache_control else {}
            keys = [*(key.jwk for key in self.keys), *self.other_keys]
            return Response(200, {"keys": keys}, control)
        if path == TOKEN:
            return self._issue(_token_request(headers, body), headers, body)
        return Response(404, {"error": "not_found"}, {})

    def _discovery(self) -> dict[str, object]:
        document = {
            "issuer": self.issuer,
            "jwks_uri": self.jwks_url,
            "token_endpoint": self.token_url,
            "id_token_signing_alg_values_supported": list(ALGORITHMS),
        }
        return _without_none({**document, **self.metadata})

    def _issue(self, request: TokenRequest, headers: Mapping[str, str], body: str) -> Response:
        """Return a token, or an error of RFC 6749, section 5.2."""
        with self.lock:
            self.token_requests.append(request)
        no_store = {"Cache-Control": "no-store"}
        if not self._is_authentic(request, headers, body):
            challenge = {"WWW-Authenticate": 'Basic realm="token"'}
            return Response(401, {"error": "invalid_client"}, no_store | challenge)
        if request.form.get("grant_type") != "client_credentials":
            return Response(400, {"error": "unsupported_grant_type"}, no_store)
        scope = request.form.get("scope", "")
        with self.lock:
            number = len(self.issued_tokens)
            lifetime = self.expires_in or 300
            expiry = int(time.time() + lifetime)
            token = self.mint(sub=request.client_id, scope=scope, jti=str(number), exp=expiry)
            self.issued_tokens.append(token)
        document = {
            "access_token": token,
            "token_type": "Bearer",
            "scope": scope,
            "expires_in": self.expires_in,
        }
        return Response(200, _without_none({**document, **self.token_response}), no_store)

    def _is_authentic(self, request: TokenRequest, headers: Mapping[str, str], body: str) -> bool:
        secret = _credentials(headers, body)[1]
        is_known = self.clients.get(request.client_id) == secret
        return is_known and request.method in self.methods


def _without_none(document: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in document.items() if value is not None}


def _credentials(headers: Mapping[str, str], body: str) -> tuple[str, str, str]:
    """Return ID, secret and method of a client: RFC 6749, section 2.3.1."""
    scheme, _, encoded = headers.get("Authorization", "").partition(" ")
    if scheme == "Basic":
        client_id, _, secret = base64.b64decode(encoded).decode().partition(":")
        return unquote_plus(client_id), unquote_plus(secret), "basic"
    form = dict(parse_qsl(body))
    return form.get("client_id", ""), form.get("client_secret", ""), "post"


def _token_request(headers: Mapping[str, str], body: str) -> TokenRequest:
    client_id, _, method = _credentials(headers, body)
    form = {key: value for key, value in parse_qsl(body) if key != "client_secret"}
    return TokenRequest(form, client_id, method)


class _Handler(BaseHTTPRequestHandler):
    server: Provider
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        """Respond, or have trouble."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        with self.server.lock:
            self.server.fetches[self.path] += 1
        trouble = self.server.troubles.get(self.path)
        while trouble is Trouble.FROZEN:
            time.sleep(0.02)
            trouble = self.server.troubles.get(self.path)
        with contextlib.suppress(OSError):  # the client has disconnected
            self._respond(body, trouble)

    do_GET = do_POST  # noqa: N815 - http.server names it

    def _respond(self, body: str, trouble: Trouble | None) -> None:
        location = {"Location": self.server.issuer + ELSEWHERE + self.path}
        if trouble is Trouble.CUT:
            self.close_connection = True
        elif trouble is Trouble.ERROR:
            self._send(500, {}, b"{}")
        elif trouble is Trouble.GARBAGE:
            self._send(200, {}, b"<html>it works</html>")
        elif trouble is Trouble.REDIRECT:
            self._send(302, location, b"")
        else:
            path = self.path.partition("?")[0].removeprefix(ELSEWHERE)
            response = self.server.respond(path, dict(self.headers), body)
            is_oversized = trouble is Trouble.OVERSIZED
            padding = {"padding": "x" * OVERSIZED_BYTES} if is_oversized else {}
            content = json.dumps({**response.document, **padding}).encode()
            self._send(response.status, response.headers, content, trouble is Trouble.SLOW)

    def _send(
        self, status: int, headers: Mapping[str, str], content: bytes, is_slow: bool = False
    ) -> None:
        length = str(len(content))
        headers = {"Content-Type": "application/json", "Content-Length": length, **headers}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if not is_slow:
            self.wfile.write(content)
            return
        for number in range(len(content)):
            self.wfile.write(content[number : number + 1])
            time.sleep(1 / SLOW_BYTES_PER_SECOND)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def running_provider(port: int = 0) -> Iterator[Provider]:
    """Run a provider during the block. Port 0 is any free one; a later one may have the same."""
    with Provider(port) as provider:
        thread = threading.Thread(target=provider.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield provider
        finally:
            provider.troubles = {}  # releases requests without a response
            provider.shutdown()
            thread.join()
