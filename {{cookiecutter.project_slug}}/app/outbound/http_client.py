"""HTTP client for another service: bounded time and size, safe retries.

Each call goes through a circuit breaker. The client follows no redirects and uses no proxy from the
environment: either could send a request, and its secrets, elsewhere.
"""

import asyncio
import contextlib
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp
import certifi
import orjson
import stamina
from prometheus_client import Histogram

from app.outbound.circuit_breaker import CircuitBreaker
from app.telemetry import tracing
from app.telemetry.context import request_id

MAX_RESPONSE_BYTES = 1 << 20
MAX_ATTEMPTS = 3
#: Time limit for one attempt.
ATTEMPT_SECONDS = 2.0
#: Time limit for all attempts together.
DEADLINE_SECONDS = 5.0
#: Maximum random addition to the pause between attempts.
JITTER_SECONDS = 0.1
#: Idle time after which a connection is closed: sooner than most servers do it.
KEEP_ALIVE_SECONDS = 5.0
#: The idempotent methods, which are safe to retry (RFC 9110, section 9.2.2).
_IDEMPOTENT_METHODS = {"GET", "HEAD", "OPTIONS", "PUT", "DELETE"}
_SECONDS = Histogram(
    "http_client_request_duration_seconds", "Each attempt, by its outcome.", ["upstream", "outcome"]
)
#: Outcomes in the metrics, by the class of the error; any other error has the name of its class.
_OUTCOMES = {
    aiohttp.ClientConnectorError: "ConnectError",
    aiohttp.ServerDisconnectedError: "RemoteProtocolError",
    aiohttp.ClientPayloadError: "RemoteProtocolError",
    aiohttp.ClientResponseError: "RemoteProtocolError",
    aiohttp.ClientOSError: "ReadError",
}


class UpstreamError(Exception):
    """No response, or 429 or 5xx. The call may have had its effect."""


class _TooLargeError(Exception):
    """The body of the response exceeds `MAX_RESPONSE_BYTES`."""


@dataclass(frozen=True, slots=True)
class UpstreamResponse:
    """A response: a status under 500 other than 429, and the body as it was sent."""

    status: int
    body: bytes
    #: The names of the headers are case-insensitive.
    headers: Mapping[str, str] = field(default_factory=dict, compare=False)


class TokenSource(Protocol):
    """Tokens for the calls of a client, see client_credentials.py."""

    async def token(self) -> str:
        """Return a valid token. Raises `UpstreamError` or `CircuitOpenError`."""

    def reject(self, token: str) -> bool:
        """Note a response 401 to this token; return whether `token()` has another one."""


class UpstreamClient:
    """A pool of connections to one upstream. Create it in a running event loop; close it."""

    def __init__(
        self,
        upstream: str,
        url: str,
        breaker: CircuitBreaker,
        connections: int = 20,
        tls: ssl.SSLContext | None = None,
        tokens: TokenSource | None = None,
    ) -> None:
        """Each request has a token of `tokens`, if any. Close them after this client.

        `tls` trusts other authorities than the public ones of certifi, or has a certificate.
        The variables SSL_CERT_FILE and SSL_CERT_DIR have no effect.
        """
        self.upstream = upstream
        self.url = url.rstrip("/")
        self.breaker = breaker
        self.tokens = tokens
        self.http = aiohttp.ClientSession(
            connector=_connector(connections, tls),
            # A compressed body within the size limit may be large when it is decompressed.
            headers={"Accept-Encoding": "identity"},
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            json_serialize=_to_json,
            # Each attempt has its own time limit, ATTEMPT_SECONDS.
            timeout=aiohttp.ClientTimeout(),
            trust_env=False,
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self.http.close()

    async def request(
        self,
        method: str,
        path: str,
        headers: dict[str, str],
        is_idempotent: bool = False,
        **content: Any,
    ) -> UpstreamResponse:
        """Send a request with the current request ID, within `DEADLINE_SECONDS`.

        `content` is passed to aiohttp: `data`, `json` or `params`. A method that is not idempotent
        is retried only with an `Idempotency-Key`, or if `is_idempotent` says that it is. Raises
        `UpstreamError`, or `CircuitOpenError` of the breaker.
        """
        all_headers = headers | {"X-Request-ID": request_id()}
        is_safe = is_idempotent or method in _IDEMPOTENT_METHODS or "Idempotency-Key" in headers
        send = self._retry_with_token if self.tokens else self._retry
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DEADLINE_SECONDS):
                return await send(method, path, is_safe, headers=all_headers, **content)
        raise UpstreamError(self.upstream, "no response in time")

    async def _retry_with_token(
        self, method: str, path: str, is_safe: bool, headers: dict[str, str], **content: Any
    ) -> UpstreamResponse:
        """Send the request with a token, and once more with another if the response is 401.

        The upstream has done nothing then, so that this is safe with every method.
        """
        assert self.tokens is not None  # noqa: S101 - for mypy
        token = await self.tokens.token()
        bearer = headers | {"Authorization": f"Bearer {token}"}
        response = await self._retry(method, path, is_safe, headers=bearer, **content)
        if response.status == 401 and self.tokens.reject(token):
            token = await self.tokens.token()
            bearer = headers | {"Authorization": f"Bearer {token}"}
            response = await self._retry(method, path, is_safe, headers=bearer, **content)
        return response

    async def _retry(
        self, method: str, path: str, is_safe: bool, headers: dict[str, str], **content: Any
    ) -> UpstreamResponse:
        attempts = stamina.retry_context(
            UpstreamError,
            attempts=MAX_ATTEMPTS if is_safe else 1,
            timeout=DEADLINE_SECONDS,
            wait_jitter=JITTER_SECONDS,
        )
        async for attempt in attempts:
            with attempt, self.breaker.call():
                return await self._attempt(method, path, headers, **content)
        raise AssertionError  # unreachable: the last attempt returns or raises

    async def _attempt(
        self, method: str, path: str, headers: dict[str, str], **content: Any
    ) -> UpstreamResponse:
        """Make one attempt, with a span; observe its duration. Raises `UpstreamError`."""
        start = time.perf_counter()
        outcome = "Cancelled"
        url = f"{self.url}/{path.lstrip('/')}"
        call = tracing.HttpCall(method, url)
        try:
            async with asyncio.timeout(ATTEMPT_SECONDS):
                all_headers = headers | call.headers
                response = await self._send(method, url, headers=all_headers, **content)
            outcome = str(response.status)
        except _TooLargeError as error:
            outcome = "TooLarge"
            raise UpstreamError(self.upstream, outcome) from error
        except (aiohttp.ClientError, TimeoutError) as error:
            outcome = _outcome(error)
            raise UpstreamError(self.upstream, outcome) from error
        finally:
            call.end(outcome)
            _SECONDS.labels(self.upstream, outcome).observe(time.perf_counter() - start)
        if response.status == 429 or response.status >= 500:
            raise UpstreamError(self.upstream, outcome)
        return response

    async def _send(self, method: str, url: str, **options: Any) -> UpstreamResponse:
        """Send the request; read the response in chunks, up to the size limit."""
        body = b""
        async with self.http.request(method, url, allow_redirects=False, **options) as response:
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > MAX_RESPONSE_BYTES:
                    raise _TooLargeError
        return UpstreamResponse(response.status, body, response.headers)


def _connector(connections: int, tls: ssl.SSLContext | None) -> aiohttp.TCPConnector:
    return aiohttp.TCPConnector(
        limit=connections,
        keepalive_timeout=KEEP_ALIVE_SECONDS,
        # A name that leads elsewhere after a fail-over is followed by each new connection.
        use_dns_cache=False,
        ssl=tls or ssl.create_default_context(cafile=certifi.where()),
    )


def _to_json(value: Any) -> str:
    return orjson.dumps(value).decode()


def _outcome(error: Exception) -> str:
    """Return the name of an error in the metrics and in `UpstreamError`."""
    names = [name for kind, name in _OUTCOMES.items() if isinstance(error, kind)]
    return names[0] if names else type(error).__name__
