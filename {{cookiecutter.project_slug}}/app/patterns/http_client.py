"""Calls to another service: bounded in time and size, tried again where that is safe, behind a breaker.

It follows no redirects and takes no proxy from the environment: both could send a request, and its secrets, elsewhere.
"""

import asyncio
import logging
import time
from http.cookiejar import DefaultCookiePolicy
from typing import Any, NamedTuple

import httpx
import stamina
from prometheus_client import Histogram

from app.patterns.circuit_breaker import CircuitBreaker
from app.telemetry.context import request_id

MAX_RESPONSE_BYTES = 1 << 20
ATTEMPTS, ATTEMPT_SECONDS, DEADLINE_SECONDS = 3, 2.0, 5.0
_SAFE = {"GET", "HEAD", "OPTIONS", "PUT", "DELETE"}  # to do twice (RFC 9110, section 9.2.2)
_SECONDS = Histogram(
    "http_client_request_duration_seconds", "Each try, by its outcome.", ["upstream", "outcome"]
)
logging.getLogger("httpx").setLevel(logging.WARNING)  # else a line for each request


class UpstreamError(Exception):
    """No answer, or one that says "not now": 429 or 5xx. The call may have had its effect, or not."""


class UpstreamResponse(NamedTuple):
    """What came back: a status under 500, and the body as it was sent."""

    status: int
    body: bytes


class UpstreamClient:
    """A pool of connections to one upstream; close it with `http.aclose()`."""

    def __init__(
        self, upstream: str, url: str, breaker: CircuitBreaker, connections: int = 20
    ) -> None:
        self.upstream, self.breaker = upstream, breaker
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self.http = httpx.AsyncClient(
            base_url=url, timeout=ATTEMPT_SECONDS, limits=limits, trust_env=False
        )
        self.http.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))  # it keeps none
        self.http.headers["Accept-Encoding"] = "identity"  # what is small when packed may be large

    async def request(
        self, method: str, path: str, headers: dict[str, str], **content: Any
    ) -> UpstreamResponse:
        """Call, within `DEADLINE_SECONDS`; `content` is httpx's. Raises `UpstreamError`, or the breaker's `CircuitOpenError`.

        A call that is not safe is tried again only with an `Idempotency-Key`. The request's ID goes with it.
        """
        attempts = ATTEMPTS if method in _SAFE or "Idempotency-Key" in headers else 1
        sent = headers | {"X-Request-ID": request_id()}
        retries = stamina.retry_context(
            UpstreamError, attempts=attempts, timeout=DEADLINE_SECONDS, wait_jitter=0.1
        )
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                async for attempt in retries:
                    with attempt, self.breaker.call():
                        return await self._try(method, path, headers=sent, **content)
        except TimeoutError:
            pass
        raise UpstreamError(self.upstream, "no answer in time")

    async def _try(self, *request: str, **options: Any) -> UpstreamResponse:
        start, body, outcome = time.perf_counter(), b"", "Cancelled"
        try:
            async with (
                asyncio.timeout(ATTEMPT_SECONDS),
                self.http.stream(*request, **options) as response,
            ):
                async for part in response.aiter_raw():
                    body += part
                    if len(body) > MAX_RESPONSE_BYTES:
                        break
            outcome = str(response.status_code) if len(body) <= MAX_RESPONSE_BYTES else "TooLarge"
        except (httpx.HTTPError, TimeoutError) as error:
            outcome = type(error).__name__
        finally:
            _SECONDS.labels(self.upstream, outcome).observe(time.perf_counter() - start)
        if not outcome.isdigit() or outcome == "429" or int(outcome) >= 500:
            raise UpstreamError(self.upstream, outcome)
        return UpstreamResponse(int(outcome), body)
