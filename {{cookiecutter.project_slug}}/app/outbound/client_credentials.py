"""Access tokens for calls to another service: client credentials (RFC 6749, section 4.4).

A process fetches a token once for all calls that wait, and renews it in the background before it
expires. So the provider may be down for the rest of a token's lifetime without a failed call.
Tokens and secrets are in no log line, error or trace.
"""

import asyncio
import base64
import logging
import math
import re
import ssl
import time
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import quote_plus, urlencode, urlsplit

import orjson

from app.outbound.circuit_breaker import CircuitBreaker
from app.outbound.http_client import UpstreamClient, UpstreamError, UpstreamResponse
from app.tasks import StateLog

#: The part of a token's lifetime after which it is renewed, and after which it is not used.
RENEW_AT = 0.75
STOP_AT = 0.95
#: The lifetime of a token that comes without one (RFC 6749, section 5.1, recommends it).
DEFAULT_LIFETIME_SECONDS = 300.0
#: A longer lifetime is cut to this one.
MAX_LIFETIME_SECONDS = 86_400.0
#: After a failure, calls fail for this time without another request to the provider.
FAILURE_SECONDS = 1.0
#: How often at most a 401 of the called service leads to a new token.
REJECTED_SECONDS = 10.0
#: The syntax of a bearer token: RFC 6750, section 2.1.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
#: An error code of RFC 6749, section 5.2. Other texts of a provider may quote the request.
_ERROR_CODE = re.compile(r"[a-z_]{1,40}")
_HEADERS = {"Accept": "application/json", "Content-Type": "application/x-www-form-urlencoded"}
logger = logging.getLogger("app.credentials")


class ClientCredentials:
    """The token of one client at one provider. Create it in a running event loop; close it."""

    def __init__(
        self,
        upstream: str,
        token_url: str,
        client_id: str,
        client_secret: str,
        parameters: Mapping[str, str] | None = None,
        method: Literal["basic", "post"] = "basic",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`upstream` names the provider in metrics and logs, for example `billing-token`.

        `parameters` are sent with each request, for example `scope`, `audience` or `resource`
        (RFC 8707). `method` is how the client authenticates: RFC 6749, section 2.3.1.
        """
        url = urlsplit(token_url)
        breaker = CircuitBreaker(upstream)
        self.client = UpstreamClient(upstream, f"{url.scheme}://{url.netloc}", breaker, 1, tls)
        self.path = url.path
        form = {"grant_type": "client_credentials", **(parameters or {})}
        self.headers = dict(_HEADERS)
        if method == "basic":
            self.headers["Authorization"] = _basic(client_id, client_secret)
        else:
            form |= {"client_id": client_id, "client_secret": client_secret}
        self.body = urlencode(form).encode()
        self.log = StateLog(logger, "no new token", "new token")
        self.fetching: asyncio.Task[str] | None = None
        self._token = ""
        # Times by `time.monotonic()`
        self.renew_at = -math.inf
        self.stop_at = -math.inf
        self.failed_at = -math.inf
        self.rejected_at = -math.inf

    async def aclose(self) -> None:
        """Cancel a request for a token; close the connection."""
        if self.fetching:
            self.fetching.cancel()
            await asyncio.wait([self.fetching])
        await self.client.aclose()

    async def token(self) -> str:
        """Return a token that is valid. Only the first and an expired one are waited for.

        Raises `UpstreamError`, or `CircuitOpenError`, if there is none.
        """
        now = time.monotonic()
        if now < self.renew_at:
            return self._token
        has_failed = now - self.failed_at < FAILURE_SECONDS
        if now < self.stop_at:
            if not has_failed:
                self._fetch_in_background()
            return self._token
        if has_failed:
            raise UpstreamError(self.client.upstream, "no token")
        # Shielded: another caller may wait for the same request.
        return await asyncio.shield(self._fetch_in_background())

    def reject(self, token: str) -> bool:
        """Note that the called service responded 401; return whether a new token is worth a retry.

        A service that rejects every token must not cause a request to the provider for each call.
        """
        if token != self._token:
            return True  # another call has rejected it before
        now = time.monotonic()
        if now - self.rejected_at < REJECTED_SECONDS:
            return False
        self.rejected_at = now
        self._token = ""
        self.renew_at = -math.inf
        self.stop_at = -math.inf
        return True

    def _fetch_in_background(self) -> "asyncio.Task[str]":
        """Return the request for a token that is in progress, or start one."""
        if self.fetching is None:
            self.fetching = asyncio.create_task(self._fetch(), name="client_credentials")
            self.fetching.add_done_callback(self._finish)
        return self.fetching

    def _finish(self, task: "asyncio.Task[str]") -> None:
        self.fetching = None
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self.log.succeeded(upstream=self.client.upstream)
            return
        self.failed_at = time.monotonic()
        self.log.failed(str(error.args[-1]), upstream=self.client.upstream)

    async def _fetch(self) -> str:
        """Ask for a token; keep and return it. Raises `UpstreamError` or `CircuitOpenError`."""
        # Before the request: the lifetime begins when the provider makes the token.
        start = time.monotonic()
        response = await self.client.request(
            "POST", self.path, self.headers, is_idempotent=True, data=self.body
        )
        token, lifetime = self._parse(response)
        self._token = token
        self.renew_at = start + RENEW_AT * lifetime
        self.stop_at = start + STOP_AT * lifetime
        return token

    def _parse(self, response: UpstreamResponse) -> tuple[str, float]:
        """Return the token and its lifetime: RFC 6749, section 5. Raises `UpstreamError`."""
        document = _json_object(response.body)
        if response.status != 200:
            code = str(document.get("error"))
            reason = code if _ERROR_CODE.fullmatch(code) else "no token"
            raise UpstreamError(self.client.upstream, f"{reason}: {response.status}")
        token = document.get("access_token")
        kind = str(document.get("token_type"))
        lifetime = _lifetime(document.get("expires_in", DEFAULT_LIFETIME_SECONDS))
        is_valid = isinstance(token, str) and _TOKEN.fullmatch(token) and kind.lower() == "bearer"
        if not is_valid or not lifetime > 0:
            raise UpstreamError(self.client.upstream, "invalid token response")
        return str(token), min(lifetime, MAX_LIFETIME_SECONDS)


def _basic(client_id: str, client_secret: str) -> str:
    """Return the header of a client: form-encoded first, as RFC 6749, section 2.3.1, requires."""
    login = f"{quote_plus(client_id)}:{quote_plus(client_secret)}"
    return f"Basic {base64.b64encode(login.encode()).decode()}"


def _json_object(body: bytes) -> dict[str, Any]:
    """Return the object, or an empty one for anything else."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return document if isinstance(document, dict) else {}


def _lifetime(value: object) -> float:
    """Return seconds, or 0 for anything but a number. Some providers send a string."""
    try:
        return float(str(value))
    except ValueError:
        return 0
