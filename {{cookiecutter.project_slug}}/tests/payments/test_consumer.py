"""The consumer charges each payment once, whatever the gateway does, and loses none."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest
from redis import Redis as Client

from app.settings import Settings, load_settings
from scripts.dev_services import free_port
from scripts.fake_gateway import FakeGateway
from tests.documented_metrics import assert_documented
from tests.service_process import PROJECT, Running, Service, eventually, frozen, serving

pytestmark = pytest.mark.process

#: More than a busy machine needs; less than the minute after which pending payments are
#: republished.
SETTLED_SECONDS = 40
PREFIX = Settings().redis_key_prefix
STREAM = f"{PREFIX}:payment-events"
DEAD_LETTERS = f"{STREAM}.dead"


class Consumer(Running):
    """A consumer process."""

    def __init__(self, module: str = "app.payments.consumer", /, **settings: str) -> None:
        self.module = module
        self.settings = settings
        self.port = free_port()
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 - closed by consuming()
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Start the process."""
        own = {"ENVIRONMENT": "development", "METRICS_BIND": f"127.0.0.1:{self.port}"}
        return subprocess.Popen(
            [sys.executable, "-m", self.module],
            cwd=PROJECT,
            env=os.environ | own | self.settings,
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}")

    def is_ready(self) -> bool:
        return self.get("/health/ready").status_code == 200


@contextlib.contextmanager
def consuming(**settings: str) -> Iterator[Consumer]:
    """Run a consumer until the end of the block, or until it is stopped before."""
    consumer = Consumer(**settings)
    try:
        eventually(consumer.is_ready)
        yield consumer
    finally:
        if consumer.process.poll() is None:
            consumer.stop()
        consumer.output.close()


@pytest.fixture
def redis_client(urls: dict[str, str]) -> Any:
    """A client of Redis, with an empty dead-letter stream."""
    client = Client.from_url(urls["REDIS_URL"])
    client.delete(DEAD_LETTERS)
    return client


def pay(service: Service, **headers: str) -> str:
    """Create a payment and return its ID."""
    new = {"amount": 1250, "currency": "EUR", "reference": "consumer"}
    all_headers = {"Idempotency-Key": str(uuid4())} | headers
    response = service.http.post("/payments", json=new, headers=all_headers)
    assert response.status_code == 201
    payment_id: str = response.json()["payment_id"]
    return payment_id


def status(service: Service, payment_id: str) -> str:
    found: str = service.get(f"/payments/{payment_id}").json()["status"]
    return found


def statuses(service: Service, payment_ids: list[str]) -> list[str]:
    return [status(service, payment_id) for payment_id in payment_ids]


def charges(gateway: FakeGateway, payment_ids: list[str]) -> list[int]:
    return [gateway.charges[payment_id] for payment_id in payment_ids]


def query_value(url: str, query: str, payment_id: str) -> Any:
    """Return the value of a query on the database."""

    async def fetch() -> Any:
        connection = await asyncpg.connect(url)
        try:
            return await connection.fetchval(query, payment_id)
        finally:
            await connection.close()

    return asyncio.run(fetch())


def wait_until_settled(service: Service, *payment_ids: str) -> None:
    """Wait until clients read that these payments are settled."""
    eventually(lambda: set(statuses(service, list(payment_ids))) == {"settled"}, SETTLED_SECONDS)


def test_payment_is_charged_once_with_the_request_id(
    urls: dict[str, str], service: Service, gateway: FakeGateway
) -> None:
    with consuming(**urls) as consumer:
        payment_id = pay(service, **{"X-Request-ID": "from-the-client"})
        wait_until_settled(service, payment_id)
        (headers,) = [
            call.headers
            for call in gateway.requests
            if call.headers["Idempotency-Key"] == payment_id
        ]
        assert headers["X-Request-ID"] == "from-the-client"
        # Counted after the acknowledgement, which follows the commit; with events of other tests.
        done = r'stream_messages_handled_total{outcome="done",stream="payment-events"} [1-9]'
        eventually(lambda: re.search(done, consumer.get("/metrics").text))
        call = 'http_client_request_duration_seconds_count{outcome="201",upstream="gateway"}'
        assert call in consumer.get("/metrics").text
        eventually(lambda: "stream_lag_seconds" in consumer.get("/metrics").text)
        assert_documented(consumer.get("/metrics").text)
        assert_documented(service.metrics(strip_prefix=False))
        probes = [f"/health/{name}" for name in ("live", "startup", "ready")]
        eventually(lambda: {consumer.get(probe).status_code for probe in probes} == {200})
        assert consumer.stop() == 0
    assert gateway.charges[payment_id] == 1
    assert gateway.calls[payment_id] == 1


def test_each_process_has_its_own_name_in_postgres(urls: dict[str, str]) -> None:
    """`application_name`: "Error Reporting and Logging" in the documentation of Postgres."""
    query = "select array_agg(distinct application_name) from pg_stat_activity where $1 <> ''"
    named = urls | {"SERVICE_NAME": "orders"}
    with serving(**named) as orders, consuming(**named):
        orders.wait()
        wait_until_settled(orders, pay(orders))
        processes = {"orders-api", "orders-consumer"}
        probes = {"orders-api-probe", "orders-consumer-probe"}
        eventually(
            lambda: processes | probes <= set(query_value(urls["DATABASE_URL"], query, "all"))
        )


def test_failing_gateway_delays_payments_only(
    urls: dict[str, str], service: Service, gateway: FakeGateway
) -> None:
    gateway.status = 503
    with consuming(**urls) as consumer:
        payment_ids = [pay(service) for _ in range(20)]
        is_open = 'circuit_breaker_open{upstream="gateway"} 1.0'
        eventually(lambda: is_open in consumer.get("/metrics").text)
        eventually(lambda: len(gateway.requests) > 8)
        # At most 8 calls until the circuit opens, then one in 3 s.
        since_open = gateway.requests[7:]
        assert all(later.at - earlier.at >= 3 for earlier, later in pairwise(since_open))
        eventually(lambda: consumer.is_ready() and service.get("/health/ready").status_code == 200)
        assert set(statuses(service, payment_ids)) == {"pending"}
        gateway.status = 0
        wait_until_settled(service, *payment_ids)
        assert "Traceback" not in consumer.text
    assert charges(gateway, payment_ids) == [1] * 20


def test_late_response_of_the_gateway_charges_once(
    urls: dict[str, str], service: Service, gateway: FakeGateway
) -> None:
    gateway.delay_seconds = 2.5
    with consuming(**urls):
        payment_ids = [pay(service) for _ in range(3)]
        eventually(lambda: all(gateway.calls[payment_id] > 1 for payment_id in payment_ids))
        gateway.delay_seconds = 0
        wait_until_settled(service, *payment_ids)
    assert charges(gateway, payment_ids) == [1] * 3


def test_control_gateway_without_keys_charges_twice(
    urls: dict[str, str], service: Service, gateway: FakeGateway
) -> None:
    """Only the key prevents it, so the previous test can fail."""
    gateway.delay_seconds = 2.5
    gateway.honors_keys = False
    with consuming(**urls):
        payment_id = pay(service)
        eventually(lambda: gateway.calls[payment_id] > 1)
        gateway.delay_seconds = 0
        wait_until_settled(service, payment_id)
    assert gateway.charges[payment_id] > 1


def test_declined_payment_is_dead_lettered_and_not_retried(
    urls: dict[str, str], service: Service, gateway: FakeGateway, redis_client: Any
) -> None:
    """Not even after Redis has lost its data; but when an operator makes it due."""
    url = urls["DATABASE_URL"]
    with consuming(**urls) as consumer:
        gateway.status = 402
        declined = pay(service)
        eventually(lambda: redis_client.xlen(DEAD_LETTERS) == 1)
        eventually(lambda: dead_letter_levels(consumer) == ["error"])
        gateway.status = 0
        good = pay(service)
        wait_until_settled(service, good)
        assert status(service, declined) == "pending"
        is_stopped = "select announce_at = 'infinity' from payments where payment_id = $1"
        assert query_value(url, is_stopped, declined) is True
        assert query_value(url, is_stopped, good) is False
        # Redis loses the event of a pending payment, which is republished; the declined one is not.
        with frozen(consumer.process.pid):
            length = redis_client.xlen(STREAM)
            lost = pay(service)
            eventually(lambda: redis_client.xlen(STREAM) > length)
            reasons = dead_letter_reasons(redis_client)
            redis_client.flushall()
        wait_until_settled(service, lost)
        time.sleep(1)
        assert gateway.calls[declined] == 1
        make_due = "update payments set announce_at = now() where payment_id = $1"
        query_value(url, make_due, declined)
        wait_until_settled(service, declined)
    assert reasons == [b"declined by the gateway: 402"]


def test_other_messages_are_dead_lettered_with_the_reason(
    urls: dict[str, str], service: Service, redis_client: Any
) -> None:
    unknown_payment = {
        "event_id": str(uuid4()),
        "type": "payment.created",
        "payload": json.dumps({"payment_id": str(uuid4())}),
    }
    messages = (
        unknown_payment,
        {"payload": "nonsense"},
        {"event_id": "x", "payload": "[1]"},
        {"other": "1"},
    )
    with consuming(**urls) as consumer:
        for message in messages:
            redis_client.xadd(STREAM, message)
        eventually(lambda: redis_client.xlen(DEAD_LETTERS) == 4)
        wait_until_settled(service, pay(service))
        eventually(lambda: dead_letter_levels(consumer) == ["error"] * 4)
    assert dead_letter_reasons(redis_client) == [
        *[b"not an event of a payment"] * 3,
        b"the payment does not exist",
    ]


def dead_letter_reasons(redis_client: Any) -> list[bytes]:
    return sorted(fields[b"reason"] for _, fields in redis_client.xrange(DEAD_LETTERS))


def dead_letter_levels(consumer: Consumer) -> list[str]:
    """Return the levels of the log lines about dead letters."""
    return [line["level"] for line in consumer.lines if "dead-lettered" in line["message"]]


def test_rejected_payments_do_not_hold_up_others(
    urls: dict[str, str], service: Service, gateway: FakeGateway
) -> None:
    with consuming(**urls) as consumer:
        with frozen(consumer.process.pid):
            payment_ids = [pay(service) for _ in range(60)]
            good = payment_ids[::4]
            bad = [payment_id for payment_id in payment_ids if payment_id not in good]
            gateway.status_by_key.update(dict.fromkeys(bad, 400))
        start = time.monotonic()
        wait_until_settled(service, *good)
        end = max(call.at for call in gateway.requests if call.headers["Idempotency-Key"] in good)
        # 45 pauses of 3.5 s at a concurrency of 8 would take 20 s. Only the payments before the
        # first charge pause.
        assert end - start < 12
        gateway.status_by_key.clear()
        wait_until_settled(service, *bad)


def test_payment_that_fails_alone_is_dead_lettered(
    urls: dict[str, str], service: Service, gateway: FakeGateway, redis_client: Any
) -> None:
    with consuming(**urls):
        gateway.status = 500
        bad = pay(service)
        eventually(lambda: gateway.calls[bad] > 0)
        gateway.status_by_key[bad] = 500
        gateway.status = 0
        end = time.monotonic() + 180
        while not redis_client.xlen(DEAD_LETTERS) and time.monotonic() < end:
            wait_until_settled(service, pay(service))
            time.sleep(0.5)
    reasons = dead_letter_reasons(redis_client)
    assert reasons == [b"failed 5 times, most recently with UpstreamError"]


def test_redis_data_loss_loses_no_payment(
    urls: dict[str, str], service: Service, gateway: FakeGateway, redis_client: Any
) -> None:
    payment_ids = [pay(service) for _ in range(5)]
    eventually(lambda: redis_client.exists(STREAM))
    time.sleep(0.5)
    redis_client.flushall()
    with consuming(**urls):
        wait_until_settled(service, *payment_ids)
    assert charges(gateway, payment_ids) == [1] * 5


def test_sigterm_finishes_charges_in_progress_only(
    urls: dict[str, str], service: Service, gateway: FakeGateway
) -> None:
    # No charge is done before the signal.
    gateway.delay_seconds = 10
    with consuming(**urls, MESSAGE_CONCURRENCY_PER_WORKER="2") as consumer:
        payment_ids = [pay(service) for _ in range(4)]
        eventually(lambda: len([each for each in payment_ids if gateway.calls[each]]) == 2)
        consumer.process.send_signal(signal.SIGTERM)
        # For the second attempt, after 2 s.
        gateway.delay_seconds = 0
        assert consumer.process.wait(20) == 0
        assert "Traceback" not in consumer.text
    found = sorted(statuses(service, payment_ids))
    assert found == ["pending", "pending", "settled", "settled"]
    with consuming(**urls):
        wait_until_settled(service, *payment_ids)
    assert charges(gateway, payment_ids) == [1] * 4


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_next_consumer_continues_after_a_stopped_one(
    urls: dict[str, str], service: Service, gateway: FakeGateway, number: int
) -> None:
    gateway.delay_seconds = 0.3
    payment_ids = [pay(service) for _ in range(20)]
    with consuming(**urls) as consumer:
        eventually(lambda: len(gateway.calls) > 4)
        consumer.stop(number)
    with consuming(**urls):
        wait_until_settled(service, *payment_ids)
    assert charges(gateway, payment_ids) == [1] * 20


@pytest.mark.parametrize(
    "url",
    [
        "https:///charges",
        "https://:443",
        "https://gw/v1?x=1",
        "https://256.1.1.1",
        "https://[v1.x]",
        "ftp://gw",
    ],
)
def test_invalid_gateway_url_is_rejected(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_URL", url)
    with pytest.raises(SystemExit) as rejected:
        load_settings()
    assert f"GATEWAY_URL={url}: must be https://gateway.example" in str(rejected.value)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8090", "https://user:p%40ss@gw.example:443/v1", "https://[::1]:1/"]
)
def test_gateway_url_may_have_address_user_and_path(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_URL", url)
    assert load_settings().gateway_url == url


@pytest.mark.parametrize("module", ["app.payments.consumer", "scripts.tail_events"])
def test_failed_start_is_one_line_without_passwords(module: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        settings = {
            "ENVIRONMENT": "development",
            "METRICS_BIND": address,
            "REDIS_URL": "redis://:hunter2@127.0.0.1:1/0",
        }
        done = run_module(module, settings)
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    assert ("REDIS_URL" if module == "scripts.tail_events" else f"METRICS_BIND={address}") in line
    assert "hunter2" not in line


@pytest.mark.parametrize("environment", ["production", "staging"])
def test_gateway_without_tls_is_rejected_outside_development(environment: str) -> None:
    settings = {"ENVIRONMENT": environment, "GATEWAY_URL": "http://:hunter2@gateway.example"}
    done = run_module("app.payments.consumer", settings)
    assert done.returncode == 1
    assert done.stderr == (
        b"configuration error: GATEWAY_URL=gateway.example: "
        b"must be https:// unless ENVIRONMENT is development\n"
    )
    assert done.stdout == b""


def run_module(module: str, settings: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", module]
    environment = os.environ | settings
    return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, check=False)
