"""Fixtures of the tests with a consumer: a gateway, and a service whose payments it charges."""

from collections.abc import Iterator

import pytest

from scripts import dev_services
from scripts.fake_gateway import FakeGateway, run_gateway
from tests.service_process import Service, serving


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with run_gateway() as server:
        yield server


@pytest.fixture
def urls(database_url: str, redis: dev_services.Redis, gateway: FakeGateway) -> dict[str, str]:
    return {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis.url,
        "GATEWAY_URL": gateway.url,
        "LOG_FORMAT": "json",
    }


@pytest.fixture
def service(urls: dict[str, str]) -> Iterator[Service]:
    with serving(**urls) as service:
        service.wait()
        yield service
