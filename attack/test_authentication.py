"""A provider of tokens that hangs for a minute, under load."""

import threading
import time
from collections.abc import Iterator

import pytest
from scripts.dev_services import Redis
from tests.auth.provider import Provider, Trouble, running_provider
from tests.auth.tokens import AUDIENCE
from tests.service_process import Service, serving

from load import Kind, load

HANG_SECONDS = 60
#: Longer than the grace of the keys, so that they are refreshed meanwhile, and that fails.
GRACE_SECONDS = 2


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    with running_provider() as provider:
        provider.cache_control = f"max-age={GRACE_SECONDS}"
        yield provider


@pytest.fixture(scope="module")
def service(provider: Provider, database_url: str, redis: Redis) -> Iterator[Service]:
    variables = {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis.url,
        "AUTH_ISSUER": provider.issuer,
        "AUTH_AUDIENCE": AUDIENCE,
    }
    # Its keys are refreshed every second.
    with serving("tests.auth.auth_routes:app", **variables) as running:
        running.wait_for_workers()
        running.wait()
        yield running


def test_provider_that_hangs_for_a_minute_costs_no_request(
    service: Service, provider: Provider
) -> None:
    """Neither with remembered tokens, nor with new ones, nor during a flood of unknown keys."""
    known = [with_token(provider.mint(), "known") for _ in range(8)]
    stop = threading.Event()
    problems: list[str] = []

    def send_new_tokens() -> None:
        while not stop.wait(0.02):
            response = service.get("/mine", Authorization=f"Bearer {provider.mint(jti=stamp())}")
            if response.status_code != 200:
                problems.append(response.text)

    unknown = provider.mint(header={"kid": "invented"})
    flood = [with_token(unknown, "unknown", statuses=(401, 503)) for _ in range(4)]
    sender = threading.Thread(target=send_new_tokens)
    with load(service.port, known, flood) as result:
        sender.start()
        time.sleep(2 * GRACE_SECONDS)
        with provider.trouble(Trouble.FROZEN):
            time.sleep(HANG_SECONDS)
            assert service.get("/health/ready").status_code == 200
        stop.set()
        sender.join()
    assert result.failures == []
    assert problems == []


def stamp() -> str:
    return str(time.monotonic_ns())


def with_token(token: str, name: str, statuses: tuple[int, ...] = (200,)) -> Kind:
    request = f"GET /mine HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {token}\r\n\r\n"
    return Kind(name, request.encode(), statuses)
