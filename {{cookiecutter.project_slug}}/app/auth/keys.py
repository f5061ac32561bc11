"""The keys of the issuer: fetched in the background, kept while its provider is unavailable.

They are refreshed before the time that `Cache-Control` allows has passed. A token whose key is not
known has them fetched at once, for all requests that wait, and at most once in a cool-down: so a
rotated key is known with its first token, and a flood of invented keys costs one fetch.

A fetch that fails changes nothing: known keys stay valid while the provider is unavailable.
"""

import asyncio
import contextlib
import logging
import random
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable
from urllib.parse import urlsplit

import certifi
import orjson
from prometheus_client import Gauge

from app.auth.errors import KeysUnavailableError
from app.auth.jwks import Key, parse_keys
from app.auth.shared_keys import Fetched, SharedKeys
from app.outbound.circuit_breaker import CircuitBreaker, CircuitOpenError
from app.outbound.http_client import UpstreamClient, UpstreamError, UpstreamResponse
from app.setting_types import check_provider_url
from app.settings import Settings
from app.tasks import StateLog, background_task

#: The time for which keys are kept: by `Cache-Control` within these bounds, or else the default.
MIN_AGE_SECONDS = 60.0
MAX_AGE_SECONDS = 3600.0
DEFAULT_AGE_SECONDS = 600.0
#: Part of that time after which they are refreshed; less a random part, or all processes would
#: fetch at once.
REFRESH_AT = 0.8
JITTER = 0.2
#: Minimum time between two fetches.
COOL_DOWN_SECONDS = 10.0
#: Time limit for a request that waits for a fetch, which goes on.
WAIT_SECONDS = 2.0
#: Maximum size of the document. Providers send 2 to 10 kB.
MAX_DOCUMENT_BYTES = 1 << 18
UPSTREAM = "identity_provider"
DISCOVERY_PATH = "/.well-known/openid-configuration"
_FETCHED = Gauge(
    "auth_keys_fetched_timestamp_seconds",
    "When the process with the oldest keys of the issuer fetched them.",
    multiprocess_mode="livemin",
)
_MAX_AGE = re.compile(r"(?:^|[\s,])max-age=\"?(\d{1,9})\"?(?:[\s,;]|$)", re.IGNORECASE)
logger = logging.getLogger("app.auth")


class FetchError(Exception):
    """The provider has sent no usable keys."""


def _do_nothing() -> None:
    pass


class KeySource:
    """The keys of the issuer, by their IDs."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.keys: dict[str | None, Key] = {}
        #: Called when a key is no longer the issuer's.
        self.on_removal: Callable[[], None] = _do_nothing
        self.jwks_url = settings.auth_jwks_url
        self.breaker = CircuitBreaker(UPSTREAM)
        self.tls = ssl.create_default_context(cafile=certifi.where())
        #: Requests that may wait for a fetch: others, with known keys, need the rest.
        self.max_waiting = max(1, settings.max_in_flight // 4)
        self.waiting = 0
        self.fetching: asyncio.Task[None] | None = None
        #: When the last fetch has started, by `time.monotonic()`.
        self.started_at = -COOL_DOWN_SECONDS
        self.has_failed = False
        #: Set when keys have been fetched.
        self.adopted = asyncio.Event()
        self.shared = SharedKeys(settings)
        self.fetched = Fetched("", 0.0, 0.0)
        self.problems: list[str] = []
        self.state_log = StateLog(logger, "no keys of the issuer", "keys of the issuer fetched")

    async def find(self, kid: str | None) -> Key | None:
        """Return the key with this ID; without one the only key. None if it is not the issuer's.

        Raises `KeysUnavailableError` if that cannot be known, since the provider does not respond.
        """
        key = self._known(kid)
        if key is None:
            await self._learn()
            key = self._known(kid)
        if key is None and self.has_failed:
            raise KeysUnavailableError(self._seconds_to_cool())
        return key

    def restore(self) -> None:
        """Start with the keys that another worker of the pod has fetched, if there are any."""
        fetched = self.shared.read()
        if fetched is not None:
            with contextlib.suppress(FetchError):
                self._adopt(fetched)

    async def refresh_periodically(self) -> None:
        """Fetch the keys now, unless others have, and then before they are too old."""
        try:
            while True:
                if self.keys:
                    await self._until_too_old()
                await asyncio.wait([self._fetch_once()])
                if not self.keys:
                    await asyncio.sleep(COOL_DOWN_SECONDS)
        finally:
            if self.fetching is not None:
                self.fetching.cancel()

    async def _until_too_old(self) -> None:
        """Wait until the keys must be refreshed; a fetch meanwhile sets a new time."""
        is_fresh = True
        while is_fresh:
            self.adopted.clear()
            try:
                async with asyncio.timeout(self._seconds_to_refresh()):
                    await self.adopted.wait()
            except TimeoutError:
                is_fresh = False

    def _known(self, kid: str | None) -> Key | None:
        if kid is None and len(self.keys) == 1:
            return next(iter(self.keys.values()))
        return self.keys.get(kid)

    async def _learn(self) -> None:
        """Fetch the keys, or wait for a fetch, unless they have just been fetched.

        Raises `KeysUnavailableError` if that takes too long.
        """
        is_cool = self._seconds_since_start() >= COOL_DOWN_SECONDS
        if self.fetching is None and not is_cool:
            return
        if self.waiting >= self.max_waiting:
            raise KeysUnavailableError(1)
        self.waiting += 1
        try:
            done, _ = await asyncio.wait([self._fetch_once()], timeout=WAIT_SECONDS)
        finally:
            self.waiting -= 1
        if not done:
            raise KeysUnavailableError(self._seconds_to_cool())

    def _fetch_once(self) -> asyncio.Task[None]:
        """Return the fetch that is under way, or start one."""
        if self.fetching is None:
            self.started_at = time.monotonic()
            self.fetching = asyncio.create_task(self._fetch(), name="fetch keys")
        return self.fetching

    async def _fetch(self) -> None:
        """Fetch the keys; log a failure, and keep the known ones."""
        self.has_failed = True
        try:
            response = await self._get_keys()
            age_seconds = max_age_seconds(response.headers.get("Cache-Control", ""))
            body = response.body.decode(errors="replace")
            fetched = Fetched(body, age_seconds, time.time())
            self._adopt(fetched)
            self.shared.write(fetched)
            self.has_failed = False
            self.state_log.succeeded()
        except (FetchError, UpstreamError, CircuitOpenError) as error:
            # The provider may have moved them.
            self.jwks_url = self.settings.auth_jwks_url
            self.state_log.failed(str(error))
        except Exception:
            logger.exception("cannot fetch the keys of the issuer")
        finally:
            self.fetching = None

    async def _get_keys(self) -> UpstreamResponse:
        if self.jwks_url is None:
            self.jwks_url = await self._discover()
        return await self._get(self.jwks_url)

    async def _discover(self) -> str:
        """Return the URL of the keys (OpenID Connect Discovery 1.0, section 4)."""
        issuer = str(self.settings.auth_issuer)
        response = await self._get(issuer.rstrip("/") + DISCOVERY_PATH)
        try:
            document = orjson.loads(response.body)
            is_issuers = document["issuer"] == issuer
            url = str(document["jwks_uri"])
            check_provider_url(url, self.settings.environment, is_of_keys=True)
        except (ValueError, TypeError, KeyError) as error:
            msg = f"unusable discovery document: {type(error).__name__}"
            raise FetchError(msg) from error
        if not is_issuers:
            msg = f"unusable discovery document: its issuer is not {issuer}"
            raise FetchError(msg)
        return url

    async def _get(self, url: str) -> UpstreamResponse:
        """Return a response with status 200. A redirect is an error, like all others."""
        parts = urlsplit(url)
        path = parts._replace(scheme="", netloc="").geturl()
        client = UpstreamClient(
            UPSTREAM, f"{parts.scheme}://{parts.netloc}", self.breaker, 1, self.tls
        )
        async with contextlib.aclosing(client):
            response = await client.request("GET", path, {"Accept": "application/json"})
        if response.status != 200:
            msg = f"status {response.status} of {url}"
            raise FetchError(msg)
        if len(response.body) > MAX_DOCUMENT_BYTES:
            msg = f"over {MAX_DOCUMENT_BYTES} bytes of {url}"
            raise FetchError(msg)
        return response

    def _adopt(self, fetched: Fetched) -> None:
        """Replace the keys by those of a document. Raises `FetchError` if it has none."""
        try:
            keys, problems = parse_keys(fetched.document)
        except ValueError as error:
            msg = f"unusable keys: {error!s:.200}"
            raise FetchError(msg) from error
        if problems != self.problems:
            self.problems = problems
            logger.warning("unusable keys of the issuer: %s", "; ".join(problems) or "none")
        if not keys:
            msg = "unusable keys: none can verify tokens"
            raise FetchError(msg)
        # Each key that was known is in the set as it was, or else what it has signed is forgotten.
        changed = [
            kid
            for kid, key in self.keys.items()
            if kid not in keys or keys[kid].members != key.members
        ]
        self.keys = keys
        if changed:
            self.on_removal()
        self.fetched = fetched
        self.adopted.set()
        _FETCHED.set(fetched.fetched_at)

    def _seconds_since_start(self) -> float:
        return time.monotonic() - self.started_at

    def _seconds_to_cool(self) -> int:
        return max(1, round(COOL_DOWN_SECONDS - self._seconds_since_start()))

    def _seconds_to_refresh(self) -> float:
        if self.has_failed:
            return COOL_DOWN_SECONDS
        part = REFRESH_AT - JITTER * random.random()  # noqa: S311
        seconds_kept = time.time() - self.fetched.fetched_at
        return max(self.fetched.age_seconds * part - max(seconds_kept, 0.0), 0.0)


def max_age_seconds(cache_control: str) -> float:
    """Return the time for which a response may be kept (RFC 9111, section 5.2.2), in bounds."""
    match = _MAX_AGE.search(cache_control)
    if match is not None:
        return min(max(float(match[1]), MIN_AGE_SECONDS), MAX_AGE_SECONDS)
    is_forbidden = "no-store" in cache_control.lower() or "no-cache" in cache_control.lower()
    return MIN_AGE_SECONDS if is_forbidden else DEFAULT_AGE_SECONDS


@contextlib.asynccontextmanager
async def open_keys(settings: Settings) -> AsyncIterator[KeySource]:
    """Yield the keys, which are kept up to date during the block."""
    keys = KeySource(settings)
    keys.restore()
    async with background_task(keys.refresh_periodically()):
        yield keys
