"""The seams for what an organization adds to each of its services, over sockets.

Mandatory dependencies, a prefix of metrics, fields of log lines: docs/forking.md of the template.
"""

import json
import logging
import re
import sys
from collections.abc import Iterator

import httpx
import pytest
from fastapi import Depends, HTTPException, Request
from prometheus_client import REGISTRY, generate_latest

from app.main import create_app
from app.setting_types import OWN_LOG_FIELDS
from app.settings import Settings
from app.telemetry import logs
from app.telemetry.metrics_prefix import PrefixedMetrics
from scripts.dev_services import Redis
from tests import default_token
from tests.conftest import InProcess
from tests.service_process import Service, eventually, serving

APP = "tests.seam_routes:app"
FIELDS = {"team": "checkout", "region": "eu west=1"}
TOKEN = {"Authorization": "Bearer token"}
#: Probes, and the name of the service.
OPEN_PATHS = ["/", "/health/live", "/health/startup", "/health/ready"]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gunicorn does not run on Windows")


@pytest.fixture(scope="module", autouse=True)
def _no_default_token() -> Iterator[None]:
    """Have these tests start from a service that asks for nothing, whatever `app.main` says."""
    with default_token.suspended():
        yield


@pytest.fixture(scope="module")
def service(database_url: str, redis: Redis) -> Iterator[Service]:
    variables = {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis.url,
        "METRICS_PREFIX": "acme_",
        "LOG_FIELDS": ", ".join(f"{name}={value}" for name, value in FIELDS.items()),
    }
    with serving(APP, **variables) as running:
        running.wait()
        yield running


def authenticate(request: Request) -> None:
    """The dependency of `tests.seam_routes`, without the metrics of that module."""
    if "authorization" not in request.headers:
        raise HTTPException(401)


def test_probes_and_root_are_without_the_mandatory_dependency(service: Service) -> None:
    assert {service.get(path).status_code for path in OPEN_PATHS} == {200}


def test_every_other_route_has_the_mandatory_dependency(service: Service) -> None:
    """Those of the application, of a router, and the handshake of a WebSocket."""
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }
    for path, status in (("/on-the-application", 200), ("/orders/on-a-router", 200)):
        assert service.get(path).status_code == 401
        assert service.get(path, **TOKEN).status_code == status
    rejected = service.http.get("/orders/websocket", headers=upgrade)
    assert rejected.status_code != 101
    with httpx.Client(base_url=service.http.base_url) as client:
        accepted = client.send(
            client.build_request("GET", "/orders/websocket", headers=upgrade | TOKEN), stream=True
        )
        assert accepted.status_code == 101
        accepted.close()


def test_prefix_is_before_the_name_of_every_metric(service: Service) -> None:
    service.get("/on-the-application", **TOKEN)
    eventually(lambda: "acme_visits_total 0.0" not in service.metrics(strip_prefix=False))
    text = service.metrics(strip_prefix=False)
    names = re.findall(r"^(?:# (?:HELP|TYPE) )?(\w+)", text, re.MULTILINE)
    assert {"acme_dependency_up", "acme_http_server_request_duration_seconds_bucket"} <= set(names)
    assert [name for name in names if not name.startswith("acme_")] == []


def test_every_log_line_has_the_fields(service: Service) -> None:
    """Lines of the master, of the workers, of requests, and of what code prints."""
    service.get("/on-the-application", **TOKEN)
    eventually(lambda: "request" in service.messages)
    loggers = {line["logger"] for line in service.lines}
    assert {"gunicorn.error", "app.sizing", "uvicorn.error", "access", "stdout"} <= loggers
    for line in service.lines:
        assert line.items() >= FIELDS.items(), line
        assert line.keys() - FIELDS.keys() <= OWN_LOG_FIELDS


def test_extra_named_like_a_field_keeps_both_values() -> None:
    formatter = logs.JsonFormatter({"service": "orders", "team": "checkout"})
    record = logging.makeLogRecord({"msg": "done", "levelname": "INFO", "team": "mine"})
    line = json.loads(formatter.format(record))
    assert (line["team"], line["extra_team"]) == ("checkout", "mine")


def test_prefix_is_added_once_to_collectors_that_repeat_an_object() -> None:
    """prometheus_client's `PlatformCollector` returns the same metric in each scrape."""
    exposed = PrefixedMetrics(REGISTRY, "acme_")
    for _ in range(2):
        text = generate_latest(exposed).decode()
        assert "\nacme_python_info{" in text
        assert "acme_acme_" not in text
    assert "\npython_info{" in generate_latest(PrefixedMetrics(REGISTRY, "")).decode()


async def test_routes_of_the_service_have_the_mandatory_dependency(settings: Settings) -> None:
    """A route that is added to the application before the dependencies would be open."""
    app = create_app(settings, dependencies=[Depends(authenticate)])
    async with InProcess(app) as client:
        for path, methods in app.openapi()["paths"].items():
            if path in OPEN_PATHS:
                continue
            for method in methods:
                response = await client.request(method, re.sub("{.*?}", "1", path))
                assert response.status_code == 401, (method, path)
