"""Payments are charged once and settled by a process of its own, whatever the gateway does; its end loses none."""

import asyncio
import contextlib
import json
import os
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

from app.settings import load_settings
from scripts import dev_services
from scripts.dev_services import free_port
from scripts.fake_gateway import Gateway, gateway
from tests.service_process import PROJECT, Running, Service, eventually, frozen, serving

#: More than a busy machine takes, and less than the minute after which everything pending is announced again.
SETTLED_SECONDS = 40


class Consumer(Running):
    """A running consumer."""

    def __init__(self, **settings: str) -> None:
        self.port, self.output = free_port(), tempfile.TemporaryFile()  # noqa: SIM115 - closed by consuming()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "app.payments.consumer"],
            cwd=PROJECT,
            env=os.environ
            | {"ENVIRONMENT": "development", "METRICS_BIND": f"127.0.0.1:{self.port}"}
            | settings,
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}")


@contextlib.contextmanager
def consuming(**settings: str) -> Iterator[Consumer]:
    """Run a consumer until the end of the block, or until it is stopped before."""
    consumer = Consumer(**settings)
    try:
        eventually(lambda: consumer.get("/health/ready").status_code == 200)
        yield consumer
    finally:
        if consumer.process.poll() is None:
            consumer.stop()
        consumer.output.close()


@pytest.fixture
def bank() -> Iterator[Gateway]:
    with gateway() as server:
        yield server


@pytest.fixture
def urls(database_url: str, redis: dev_services.Redis, bank: Gateway) -> dict[str, str]:
    return {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis.url,
        "GATEWAY_URL": bank.url,
        "LOG_FORMAT": "json",
    }


@pytest.fixture
def service(urls: dict[str, str]) -> Iterator[Service]:
    with serving(**urls) as service:
        service.wait()
        yield service


def pay(service: Service, **headers: str) -> str:
    """Send a payment and return its ID."""
    new = {"amount": 1250, "currency": "EUR", "reference": "consumer"}
    answer = service.http.post(
        "/payments", json=new, headers={"Idempotency-Key": str(uuid4())} | headers
    )
    assert answer.status_code == 201
    payment_id: str = answer.json()["payment_id"]
    return payment_id


def status(service: Service, payment_id: str) -> str:
    found: str = service.get(f"/payments/{payment_id}").json()["status"]
    return found


def ask(url: str, query: str, payment_id: str) -> Any:
    """Ask the database for a value."""

    async def fetch() -> Any:
        connection = await asyncpg.connect(url)
        try:
            return await connection.fetchval(query, payment_id)
        finally:
            await connection.close()

    return asyncio.run(fetch())


def settled(service: Service, *payment_ids: str) -> None:
    """Wait until these payments are settled, also for those who have just read that they are not."""
    eventually(
        lambda: {status(service, payment_id) for payment_id in payment_ids} == {"settled"},
        SETTLED_SECONDS,
    )


def test_a_payment_is_charged_once_and_settled_and_the_requests_id_goes_with_it(
    urls: dict[str, str], service: Service, bank: Gateway
) -> None:
    with consuming(**urls) as consumer:
        payment_id = pay(service, **{"X-Request-ID": "from-the-client"})
        settled(service, payment_id)
        (headers,) = [
            headers for _, headers in bank.requests if headers["Idempotency-Key"] == payment_id
        ]
        assert headers["X-Request-ID"] == "from-the-client"
        done = 'stream_messages_handled_total{outcome="done",stream="payment-events"}'
        eventually(
            lambda: done in consumer.get("/metrics").text
        )  # counted when Redis has been told, after the commit
        call = 'http_client_request_duration_seconds_count{outcome="201",upstream="gateway"}'
        assert call in consumer.get("/metrics").text
        probes = [f"/health/{name}" for name in ("live", "startup", "ready")]
        eventually(lambda: {consumer.get(probe).status_code for probe in probes} == {200})
        assert consumer.stop() == 0
    assert bank.charges[payment_id] == 1
    assert bank.calls[payment_id] == 1


def test_a_gateway_that_is_down_delays_payments_and_nothing_else(
    urls: dict[str, str], service: Service, bank: Gateway
) -> None:
    bank.status = 503
    with consuming(**urls) as consumer:
        payment_ids = [pay(service) for _ in range(20)]
        eventually(
            lambda: 'circuit_breaker_open{upstream="gateway"} 1.0' in consumer.get("/metrics").text
        )
        eventually(lambda: len(bank.requests) > 8)
        # At most 8 calls until it is left alone, and then one in 3 s.
        assert all(later - earlier >= 3 for (earlier, _), (later, _) in pairwise(bank.requests[7:]))
        eventually(
            lambda: (
                consumer.get("/health/ready").status_code
                == service.get("/health/ready").status_code
                == 200
            )
        )
        assert {status(service, payment_id) for payment_id in payment_ids} == {"pending"}
        bank.status = 0
        settled(service, *payment_ids)
        assert "Traceback" not in consumer.text
    assert [bank.charges[payment_id] for payment_id in payment_ids] == [1] * 20


def test_a_gateway_that_answers_too_late_charges_nobody_twice(
    urls: dict[str, str], service: Service, bank: Gateway
) -> None:
    bank.delay_seconds = 2.5
    with consuming(**urls):
        payment_ids = [pay(service) for _ in range(3)]
        eventually(lambda: all(bank.calls[payment_id] > 1 for payment_id in payment_ids))
        bank.delay_seconds = 0
        settled(service, *payment_ids)
    assert [bank.charges[payment_id] for payment_id in payment_ids] == [1] * 3


def test_a_gateway_without_keys_would_charge_somebody_twice(
    urls: dict[str, str], service: Service, bank: Gateway
) -> None:
    """The key alone keeps it from that: the test before can fail."""
    bank.delay_seconds, bank.honours_keys = 2.5, False
    with consuming(**urls):
        payment_id = pay(service)
        eventually(lambda: bank.calls[payment_id] > 1)
        bank.delay_seconds = 0
        settled(service, payment_id)
    assert bank.charges[payment_id] > 1


def test_what_is_refused_is_parked_with_the_reason_and_announced_again_only_when_somebody_decides_so(
    urls: dict[str, str], service: Service, bank: Gateway
) -> None:
    client: Any = Client.from_url(urls["REDIS_URL"])
    client.delete("payment-events.dead")
    with consuming(**urls) as consumer:
        bank.status = 402
        refused = pay(service)
        nobody = {
            "event_id": str(uuid4()),
            "type": "payment.created",
            "payload": json.dumps({"payment_id": str(uuid4())}),
        }
        for poison in (
            nobody,
            {"payload": "nonsense"},
            {"event_id": "x", "payload": "[1]"},
            {"other": "1"},
        ):
            client.xadd("payment-events", poison)
        eventually(lambda: client.xlen("payment-events.dead") == 5)
        bank.status = 0
        good = pay(service)
        settled(service, good)
        assert status(service, refused) == "pending"
        query = "select announce_at = 'infinity' from payments where payment_id = $1"
        assert [ask(urls["DATABASE_URL"], query, each) for each in (refused, good)] == [True, False]
        eventually(lambda: [line for line in consumer.lines if "is parked" in line["message"]])
        assert {line["level"] for line in consumer.lines if "is parked" in line["message"]} == {
            "error"
        }
        reasons = sorted(fields[b"reason"] for _, fields in client.xrange("payment-events.dead"))
        with frozen(consumer.process.pid):
            length = client.xlen("payment-events")
            lost = pay(service)
            eventually(lambda: client.xlen("payment-events") > length)
            client.flushall()
        settled(service, lost)  # all that is pending is announced again, and the other one is not
        time.sleep(1)
        assert bank.calls[refused] == 1
        ask(
            urls["DATABASE_URL"],
            "update payments set announce_at = now() where payment_id = $1",
            refused,
        )
        settled(service, refused)  # since somebody has decided so
    assert reasons == 3 * [b"it is no event of a payment"] + [
        b"the gateway refuses it: 402",
        b"there is no such payment",
    ]


def test_payments_that_the_gateway_does_not_take_hold_up_no_others(
    urls: dict[str, str], service: Service, bank: Gateway
) -> None:
    with consuming(**urls) as consumer:
        with frozen(consumer.process.pid):
            mixed = [pay(service) for _ in range(60)]
            good = mixed[::4]
            bad = [payment_id for payment_id in mixed if payment_id not in good]
            bank.refused.update(dict.fromkeys(bad, 400))
        start = time.monotonic()
        settled(service, *good)
        end = max(at for at, headers in bank.requests if headers["Idempotency-Key"] in good)
        # 45 pauses of 3.5 s in 8 places would take 20 s; only those that come before the first charge take one.
        assert end - start < 12
        bank.refused.clear()
        settled(service, *bad)


def test_one_payment_that_the_gateway_chokes_on_is_parked_while_others_are_charged(
    urls: dict[str, str], service: Service, bank: Gateway
) -> None:
    client: Any = Client.from_url(urls["REDIS_URL"])
    client.delete("payment-events.dead")
    with consuming(**urls):
        bank.status = 500
        bad = pay(service)
        eventually(lambda: bank.calls[bad] > 0)
        bank.refused[bad], bank.status = 500, 0
        end = time.monotonic() + 180
        while not client.xlen("payment-events.dead") and time.monotonic() < end:
            settled(service, pay(service))
            time.sleep(0.5)
    ((_, fields),) = client.xrange("payment-events.dead")
    assert fields[b"reason"] == b"failed 5 times, at last with UpstreamError"


def test_a_redis_that_lost_everything_loses_no_payment(
    urls: dict[str, str], service: Service, bank: Gateway
) -> None:
    client: Any = Client.from_url(urls["REDIS_URL"])
    payment_ids = [pay(service) for _ in range(5)]
    eventually(lambda: client.exists("payment-events"))
    time.sleep(0.5)
    client.flushall()
    with consuming(**urls):
        settled(service, *payment_ids)
    assert [bank.charges[payment_id] for payment_id in payment_ids] == [1] * 5


def test_sigterm_finishes_what_is_under_way_and_leaves_the_rest(
    urls: dict[str, str], service: Service, bank: Gateway
) -> None:
    bank.delay_seconds = 10  # so that none is done before the signal
    with consuming(**urls, MESSAGE_CONCURRENCY_PER_WORKER="2") as consumer:
        payment_ids = [pay(service) for _ in range(4)]
        eventually(lambda: len([each for each in payment_ids if bank.calls[each]]) == 2)
        consumer.process.send_signal(signal.SIGTERM)
        bank.delay_seconds = 0  # for the second try, after 2 s
        assert consumer.process.wait(20) == 0
        assert "Traceback" not in consumer.text
    found = sorted(status(service, payment_id) for payment_id in payment_ids)
    assert found == ["pending", "pending", "settled", "settled"]
    bank.delay_seconds = 0
    with consuming(**urls):
        settled(service, *payment_ids)
    assert [bank.charges[payment_id] for payment_id in payment_ids] == [1] * 4


@pytest.mark.parametrize("signals", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_consumer_left_is_charged_once_by_the_next(
    urls: dict[str, str], service: Service, bank: Gateway, signals: int
) -> None:
    bank.delay_seconds = 0.3
    payment_ids = [pay(service) for _ in range(20)]
    with consuming(**urls) as consumer:
        eventually(lambda: len(bank.calls) > 4)
        consumer.stop(signals)
    with consuming(**urls):
        settled(service, *payment_ids)
    assert [bank.charges[payment_id] for payment_id in payment_ids] == [1] * 20


def test_a_pending_payment_is_kept_in_the_cache_for_a_second_only(
    urls: dict[str, str], service: Service
) -> None:
    """So that it is soon read as settled, also if Redis is away when it is settled."""
    client: Any = Client.from_url(urls["REDIS_URL"])
    payment_id = pay(service)
    key = "cache:{payments:" + payment_id + "}"
    # Not kept where Redis is slower than the cache's budget; one that is kept for longer would stay so.
    eventually(lambda: status(service, payment_id) == "pending" and 0 < client.pttl(key) <= 1000)
    with consuming(**urls):
        settled(service, payment_id)
        # The consumer forgets the payment after it has settled it, maybe after it was read so: the next read keeps it.
        eventually(lambda: status(service, payment_id) == "settled" and client.pttl(key) > 20_000)


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
def test_a_url_that_no_charge_can_be_sent_to_is_refused(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_URL", url)
    with pytest.raises(SystemExit) as refused:
        load_settings()
    assert f"GATEWAY_URL={url}: takes https://gateway.example" in str(refused.value)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8090", "https://user:p%40ss@gw.example:443/v1", "https://[::1]:1/"]
)
def test_a_url_may_have_an_address_a_user_and_a_path(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_URL", url)
    assert load_settings().gateway_url == url


@pytest.mark.parametrize("module", ["app.payments.consumer", "scripts.tail_events"])
def test_what_is_in_the_way_is_told_in_one_line(module: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        settings = os.environ | {"ENVIRONMENT": "development", "METRICS_BIND": address}
        settings |= {"REDIS_URL": "redis://:hunter2@127.0.0.1:1/0"}
        done = subprocess.run(
            [sys.executable, "-m", module],
            cwd=PROJECT,
            env=settings,
            capture_output=True,
            check=False,
        )
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    assert ("REDIS_URL" if module == "scripts.tail_events" else f"METRICS_BIND={address}") in line
    assert "hunter2" not in line


@pytest.mark.parametrize("environment", ["production", "staging"])
def test_a_gateway_without_tls_is_refused_outside_of_development(environment: str) -> None:
    run = [sys.executable, "-m", "app.payments.consumer"]
    settings = os.environ | {
        "ENVIRONMENT": environment,
        "GATEWAY_URL": "http://:hunter2@gateway.example",
    }
    done = subprocess.run(run, cwd=PROJECT, env=settings, capture_output=True, check=False)
    assert done.returncode == 1
    line = b"configuration error: GATEWAY_URL=gateway.example: takes https:// unless ENVIRONMENT is development\n"
    assert (done.stderr, done.stdout) == (line, b"")
