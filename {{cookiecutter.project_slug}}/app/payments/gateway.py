"""The card gateway: charges payments, and attributes failures to one or to all."""

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit
from uuid import UUID

import certifi

from app.outbound.circuit_breaker import CircuitBreaker, CircuitOpenError
from app.outbound.client_credentials import ClientCredentials
from app.outbound.http_client import UpstreamClient, UpstreamError
from app.patterns.stream_handler import PoisonError, RetryLaterError
from app.payments.schemas import Payment
from app.settings import Settings, fail

#: Statuses with which a gateway declines a payment for good. Any other 4xx may be a bug of ours,
#: which can be fixed.
DECLINED_STATUSES = {402, 422}
#: Consecutive failures that open the circuit, or as many as there are concurrent charges.
MIN_FAILURES = 5
#: Failing payments that a process remembers.
MAX_REMEMBERED = 10_000


class FailureAttribution:
    """Attributes a failed charge to its payment or to the gateway.

    It is the payment's own failure if another payment was charged since this one failed before.
    Otherwise the gateway may be failing for every payment.
    """

    def __init__(self) -> None:
        #: The last success of any payment, by `time.monotonic()`.
        self.charged_at = 0.0
        #: The last failure of each payment that was not charged since.
        self.failed_at: dict[UUID, float] = {}

    def seconds_since_success(self) -> float:
        """Return the seconds since any payment was charged; a large number if none was."""
        return time.monotonic() - self.charged_at

    def record_success(self, payment_id: UUID) -> None:
        """Note that a payment was charged."""
        self.charged_at = time.monotonic()
        self.failed_at.pop(payment_id, None)

    def record_failure(self, payment_id: UUID) -> bool:
        """Note that a payment was not charged; return whether that is its own failure."""
        # Payments that other consumers have charged stay here, hence the limit.
        if len(self.failed_at) > MAX_REMEMBERED:
            self.failed_at.clear()
        now = time.monotonic()
        failed_before_at = self.failed_at.get(payment_id, now)
        self.failed_at[payment_id] = now
        return self.charged_at >= failed_before_at


class CardGateway:
    """Charges payments, each once."""

    def __init__(self, client: UpstreamClient) -> None:
        self.client = client
        self.failures = FailureAttribution()

    async def charge(self, payment: Payment) -> None:
        """Charge a payment. Its idempotency key makes repeated calls charge it once.

        Raises `PoisonError` if the gateway declines it, `UpstreamError` if the failure is the
        payment's own, and `RetryLaterError` if the gateway may be failing for every payment.
        """
        try:
            await self._call(payment)
        except CircuitOpenError as error:
            await asyncio.sleep(error.retry_in)  # no other charge would get through either
            raise RetryLaterError from error
        except UpstreamError as error:
            if self.failures.record_failure(payment.payment_id):
                raise
            raise RetryLaterError from error
        self.failures.record_success(payment.payment_id)

    async def _call(self, payment: Payment) -> None:
        key = str(payment.payment_id)
        headers = {"Idempotency-Key": key, "Content-Type": "application/json"}
        body = payment.model_dump_json().encode()
        response = await self.client.request("POST", "charges", headers, data=body)
        if response.status in DECLINED_STATUSES:
            msg = f"declined by the gateway: {response.status}"
            raise PoisonError(msg)
        if not 200 <= response.status < 300:
            await self._pause_like_the_breaker()
            raise UpstreamError("gateway", response.status)

    async def _pause_like_the_breaker(self) -> None:
        """Pause unless other payments are being charged.

        The gateway may reject every payment, for example because of an expired credential. The
        circuit breaker does not open then, since it counts such a response as a success.
        """
        seconds = self.client.breaker.reset_seconds
        if self.failures.seconds_since_success() > seconds:
            await asyncio.sleep(seconds)


def check_gateway(settings: Settings) -> None:
    """Check the settings of the gateway: invalid ones stop the start, not the work.

    Raises `SystemExit` with one line.
    """
    urls = {"GATEWAY_URL": settings.gateway_url, "GATEWAY_TOKEN_URL": settings.gateway_token_url}
    for name, url in urls.items():
        is_plaintext = url is not None and url.startswith("http://")
        if is_plaintext and settings.environment != "development":
            fail(name, url, "must be https:// unless ENVIRONMENT is development")
    if settings.gateway_token_url:
        _check_credentials(settings)
    trust_authorities(settings.gateway_ca_file)


def _check_credentials(settings: Settings) -> None:
    if not settings.gateway_client_id:
        fail("GATEWAY_CLIENT_ID", None, "must be set, since GATEWAY_TOKEN_URL is")
    if not settings.gateway_client_secret.get_secret_value():
        fail("GATEWAY_CLIENT_SECRET", None, "must be set, since GATEWAY_TOKEN_URL is")
    if "@" in urlsplit(settings.gateway_url).netloc:
        # One Authorization header has room for one of both.
        fail("GATEWAY_URL", settings.gateway_url, "must have no login, since there is a token")


def trust_authorities(ca_file: Path | None) -> ssl.SSLContext | None:
    """Return TLS that trusts the authorities of `GATEWAY_CA_FILE` only, or None if it is unset.

    Raises `SystemExit` with one line if the file has no certificate.
    """
    if ca_file is None:
        return None
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # ssl.SSLError is one
        reason = error.strerror or type(error).__name__
        fail("GATEWAY_CA_FILE", ca_file, f"must be a file of CA certificates in PEM: {reason}")


@contextlib.asynccontextmanager
async def open_gateway(settings: Settings) -> AsyncIterator[CardGateway]:
    """Yield a gateway for the concurrent charges of this process, then close its connections."""
    concurrency = settings.message_concurrency_per_worker
    breaker = CircuitBreaker("gateway", max(MIN_FAILURES, concurrency))
    tls = trust_authorities(settings.gateway_ca_file)
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        tokens = _credentials(settings)
        if tokens:
            await enter(contextlib.aclosing(tokens))
        client = UpstreamClient("gateway", settings.gateway_url, breaker, concurrency, tls, tokens)
        await enter(contextlib.aclosing(client))
        yield CardGateway(client)


def _credentials(settings: Settings) -> ClientCredentials | None:
    """Return the tokens for the gateway, or None if it requires none."""
    if settings.gateway_token_url is None:
        return None
    parameters = {
        "scope": settings.gateway_token_scopes,
        "audience": settings.gateway_token_audience,
    }
    return ClientCredentials(
        "gateway-token",
        settings.gateway_token_url,
        settings.gateway_client_id,
        settings.gateway_client_secret.get_secret_value(),
        {name: value for name, value in parameters.items() if value},
        tls=trust_authorities_and_public_ones(settings.gateway_ca_file),
    )


def trust_authorities_and_public_ones(ca_file: Path | None) -> ssl.SSLContext | None:
    """Return TLS for the provider of tokens, which may be the company's own or a public one."""
    tls = trust_authorities(ca_file)
    if tls:
        tls.load_verify_locations(certifi.where())
    return tls
