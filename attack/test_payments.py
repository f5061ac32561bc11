"""Payments under fire: processes killed, Postgres and Redis restarted, the gateway down. None is lost, none is doubled.

The controls run the same without the idempotency key, or without the inbox, and must double some: so the test can fail.
"""

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pytest
from redis import Redis as Client
from redis.exceptions import RedisError
from scripts.fake_gateway import Gateway, gateway
from tests.service_process import PROJECT, Service, eventually, frozen, serving

from scripts import dev_services
from test_faults import durable, sql, workers  # noqa: F401 - durable is a fixture

CLIENTS = 12
#: After which a payment has to be settled when everything is well again.
SETTLED_SECONDS = 30


class Consumer:
    """A consumer that is started again whenever it ends, as a platform does."""

    def __init__(self, module: str = "app.payments.consumer", /, **settings: str) -> None:
        self.module, self.settings, self.is_ending = module, settings, False
        self.port = dev_services.free_port()
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 - closed by consuming()
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Start it."""
        own = {"ENVIRONMENT": "development", "METRICS_BIND": f"127.0.0.1:{self.port}"}
        return subprocess.Popen(
            [sys.executable, "-m", self.module],
            cwd=PROJECT,
            env=os.environ | own | self.settings,
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    def kill(self, number: int) -> None:
        """End it, and start another."""
        self.process.send_signal(number)
        self.process.wait(20)
        self.process = self.start()

    def is_ready(self) -> bool:
        """Tell whether it is."""
        return httpx.get(f"http://127.0.0.1:{self.port}/health/ready").status_code == 200


@contextlib.contextmanager
def consuming(
    number: int = 1, module: str = "app.payments.consumer", /, **settings: str
) -> Iterator[list[Consumer]]:
    """Run consumers until the end of the block."""
    consumers = [Consumer(module, **settings) for _ in range(number)]
    try:
        yield consumers
    finally:
        for consumer in consumers:
            consumer.process.terminate()
        for consumer in consumers:
            assert consumer.process.wait(20) == 0
            consumer.output.close()


class Tail:
    """Counts the events by payment, as they are published, also over a Redis that loses them."""

    def __init__(self, url: str) -> None:
        self.client: Any = Client.from_url(url, socket_timeout=10)
        self.events, self.last, self.lock = Counter[str](), b"-", threading.Lock()

    def read(self) -> None:
        """Count what has come."""
        with self.lock:
            for entry, fields in self.client.xrange("payment-events", self.last):
                self.last = b"(" + entry  # the time, so that it also grows over a loss
                self.events[json.loads(fields[b"payload"])["payment_id"]] += 1

    def stop(self, redis: dev_services.Redis) -> None:
        """Stop Redis, and see all that it loses: it takes nothing more, is read, and dies."""
        self.client.client_pause(10_000, all=False)
        self.read()
        redis.stop()


@contextlib.contextmanager
def tailing(url: str) -> Iterator[Tail]:
    """Read the events beside the block."""
    stop, tail = threading.Event(), Tail(url)

    def read() -> None:
        while not stop.wait(0.02):
            with contextlib.suppress(RedisError):
                tail.read()

    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(read)
        try:
            yield tail
        finally:
            stop.set()
            running.result()


class Shop:
    """Sends payments, each until it is acknowledged, with one key for all tries; as a control, a new one each time."""

    def __init__(self, service: Service, one_key: bool = True, pause_seconds: float = 0) -> None:
        self.service, self.one_key, self.pause_seconds = service, one_key, pause_seconds
        self.acknowledged: dict[str, str] = {}  # reference: payment
        self.statuses: Counter[str] = Counter()

    def pay(self, reference: str) -> None:
        """Send a payment until it is acknowledged."""
        key = str(uuid4())
        new = {"amount": 1, "currency": "EUR", "reference": reference}
        time.sleep(random.uniform(0, self.pause_seconds))
        while reference not in self.acknowledged:
            key = key if self.one_key else str(uuid4())
            try:
                headers = {"Idempotency-Key": key}
                answer = self.service.http.post("/payments", json=new, headers=headers, timeout=8)
            except httpx.TransportError as error:
                self.statuses[type(error).__name__] += 1
            else:
                self.statuses[str(answer.status_code)] += 1
                assert answer.status_code in {201, 409, 503, 504}, answer.text
                if answer.status_code == 201:
                    self.acknowledged[reference] = answer.json()["payment_id"]
                    return
            time.sleep(random.uniform(0, 0.1))

    def run(self, number: int, run: str) -> None:
        """Send so many payments."""
        with ThreadPoolExecutor(CLIENTS) as threads:
            list(threads.map(self.pay, [f"{run} {each}" for each in range(number)]))

    def run_until(self, end: threading.Event, run: str) -> None:
        """Send payments from all clients until the end."""

        def send(client: int) -> None:
            for each in count():
                if end.is_set():
                    return
                self.pay(f"{run} {client}-{each}")

        with ThreadPoolExecutor(CLIENTS) as threads:
            list(threads.map(send, range(CLIENTS)))


def kill_a_worker(service: Service, number: int) -> bool:
    """Signal one of the workers, as far as there is one."""
    with contextlib.suppress(psutil.NoSuchProcess, httpx.TransportError, IndexError):
        random.choice(workers(service)).send_signal(number)
        return True
    return False


def settled(url: str, run: str) -> bool:
    """Tell whether every payment of a run is."""
    query = "select count(*) from payments where reference like $1 || ' %' and status <> 'settled'"
    return bool(sql(url, query, run)[0][0] == 0)


@pytest.fixture
def bank() -> Iterator[Gateway]:
    with gateway() as server:
        yield server


@pytest.fixture
def settings(urls: dict[str, str], bank: Gateway) -> dict[str, str]:
    # payments of other tests are pending: a consumer would charge them too
    sql(urls["DATABASE_URL"], "truncate payments, outbox, inbox, idempotency_keys")
    return urls | {
        "GATEWAY_URL": bank.url,
        "GRACEFUL_TIMEOUT_SECONDS": "20",
        "REQUEST_TIMEOUT_SECONDS": "6",
    }


def test_nothing_is_lost_and_nothing_doubled(
    settings: dict[str, str],
    bank: Gateway,
    postgres: dev_services.Postgres,
    redis: dev_services.Redis,
) -> None:
    run, kills = uuid4().hex[:8], Counter[str]()
    with (
        serving(**settings) as service,
        consuming(2, **settings) as consumers,
        tailing(redis.url) as tail,
    ):
        service.wait()
        shop, begin, end = Shop(service, pause_seconds=0.3), time.monotonic(), threading.Event()
        with ThreadPoolExecutor(1) as thread, contextlib.ExitStack() as at_last:
            at_last.callback(end.set)  # also if a fault cannot be done
            running = thread.submit(shop.run_until, end, run)  # as long as the faults last
            for step in range(36):
                time.sleep(0.4)
                match step:
                    case 8 | 27:
                        tail.stop(redis)
                        time.sleep(0.5)
                        redis.start()
                        kills["Redis"] += 1
                    case 18:
                        postgres.stop("immediate")
                        time.sleep(0.5)
                        postgres.start()
                        kills["Postgres"] += 1
                    case _:
                        number = (signal.SIGTERM, signal.SIGKILL)[step % 2]
                        if step % 4 == 0:
                            random.choice(consumers).kill(number)
                            kills["consumer"] += 1
                        else:
                            kills["worker"] += kill_a_worker(service, number)
            eventually(lambda: len(shop.acknowledged) >= 2000, 300)
            end.set()
            running.result()
        taken = time.monotonic()
        eventually(lambda: settled(postgres.url, run), SETTLED_SECONDS + 60)
        later = time.monotonic() - taken
        print(
            f"{taken - begin:.1f} s, settled {later:.1f} s later; {dict(kills)}; {dict(shop.statuses)}"
        )
        time.sleep(1)  # a late second call or event would come now
        eventually(
            lambda: all(consumer.is_ready() for consumer in consumers)
        )  # or its end might come before its start
        rows = sql(
            postgres.url,
            "select payment_id::text, reference from payments where reference like $1 || ' %'",
            run,
        )
    stored = {row["reference"]: row["payment_id"] for row in rows}
    assert kills["worker"] >= 20
    assert len(rows) >= 2000
    assert len(stored) == len(rows)
    assert stored == shop.acknowledged
    assert set(stored.values()) <= set(tail.events)
    assert {bank.charges[payment_id] for payment_id in stored.values()} == {1}
    assert bank.charges.total() == len(rows)
    print(
        f"{len(rows)} payments, {bank.calls.total()} calls of the gateway, {tail.events.total()} events"
    )


def test_control_without_one_key_for_all_tries_some_payments_are_doubled(
    settings: dict[str, str], postgres: dev_services.Postgres
) -> None:
    run, end = uuid4().hex[:8], threading.Event()
    query = (
        "select count(*) - count(distinct reference) from payments where reference like $1 || ' %'"
    )
    with serving(**settings) as service:
        service.wait()
        shop, latest = Shop(service, one_key=False), time.monotonic() + 120
        with ThreadPoolExecutor(1) as thread, contextlib.ExitStack() as at_last:
            at_last.callback(end.set)
            running = thread.submit(shop.run_until, end, run)
            doubled = 0
            while time.monotonic() < latest and not (doubled and len(shop.acknowledged) >= 2000):
                time.sleep(0.3)
                kill_a_worker(service, signal.SIGKILL)
                ((doubled,),) = sql(postgres.url, query, run)
            end.set()
            running.result()
    print(f"{doubled} of {len(shop.acknowledged)} payments are doubled; {dict(shop.statuses)}")
    assert doubled


@pytest.mark.parametrize("module", ["app.payments.consumer", "consumer_without_inbox"])
def test_an_event_that_comes_again_has_its_effect_once_and_without_the_inbox_twice(
    settings: dict[str, str],
    postgres: dev_services.Postgres,
    redis: dev_services.Redis,
    module: str,
) -> None:
    run = uuid4().hex[:8]
    sql(postgres.url, "create table if not exists effects (payment_id uuid)")
    sql(postgres.url, "truncate effects")
    sql(
        postgres.url,
        "create or replace function effect() returns trigger language plpgsql as $$ begin "
        "insert into effects values (new.payment_id); return new; end $$",
    )
    trigger = "create or replace trigger effect after update of status on payments for each row execute function effect()"
    sql(postgres.url, trigger)
    client: Any = Client.from_url(redis.url)
    try:
        with serving(**settings) as service, consuming(2, module, **settings) as consumers:
            service.wait()
            eventually(lambda: all(consumer.is_ready() for consumer in consumers))
            shop = Shop(service)
            with ThreadPoolExecutor(1) as thread:
                running = thread.submit(shop.run, 200, run)
                while (
                    not running.done()
                ):  # what a relay does that is killed between the publication and the commit
                    for _, fields in client.xrevrange("payment-events", count=5):
                        client.xadd("payment-events", fields)
                    time.sleep(0.05)
                running.result()
            eventually(lambda: settled(postgres.url, run), SETTLED_SECONDS)
            eventually(
                lambda: client.xinfo_groups("payment-events")[0]["pending"] == 0, SETTLED_SECONDS
            )
        most = sql(
            postgres.url,
            "select max(n), sum(n) from (select count(*) as n from effects group by payment_id) as e",
        )
    finally:
        sql(postgres.url, "drop trigger effect on payments")
    print(f"{module}: {most[0][1]} effects of 200 payments")
    assert (most[0][0] == 1) == (module == "app.payments.consumer")


def test_of_50_requests_with_one_key_one_is_taken(
    settings: dict[str, str], postgres: dev_services.Postgres
) -> None:
    reference = str(uuid4())
    new = {"amount": 1, "currency": "EUR", "reference": reference}
    with serving(**settings) as service:
        service.wait()

        def send(_: int) -> httpx.Response:
            return service.http.post("/payments", json=new, headers={"Idempotency-Key": reference})

        with ThreadPoolExecutor(50) as threads:
            answers = list(threads.map(send, range(50)))
        found = Counter(
            (answer.status_code, answer.headers.get("idempotent-replayed")) for answer in answers
        )
        print(dict(found))
        assert found[201, None] == 1
        assert set(found) <= {(201, None), (201, "true"), (409, None)}
        assert len({answer.content for answer in answers if answer.status_code == 201}) == 1
        ((payment_id,),) = sql(
            postgres.url, "select payment_id::text from payments where reference = $1", reference
        )
        client: Any = Client.from_url(settings["REDIS_URL"])

        def events() -> list[Any]:
            return [
                each
                for each in client.xrange("payment-events")
                if payment_id.encode() in each[1][b"payload"]
            ]

        eventually(lambda: len(events()) == 1)
        time.sleep(1)
        assert len(events()) == 1


def seconds(service: Service, number: int, paths: list[str]) -> list[float]:
    """Send payments and look some up, one at a time; return how long each request took."""
    found = []
    for each in range(number):
        new = {"amount": 1, "currency": "EUR", "reference": "redis"}
        answers = [
            service.http.post("/payments", json=new, headers={"Idempotency-Key": str(uuid4())}),
            service.get(paths[each % len(paths)]),
        ]
        assert [answer.status_code for answer in answers] == [201, 200]
        assert service.get("/health/ready").status_code == 200
        found += [answer.elapsed.total_seconds() for answer in answers]
    return found


@pytest.mark.parametrize("fault", ["dead", "frozen"])
def test_a_redis_that_is_away_slows_no_payment_down(
    settings: dict[str, str], postgres: dev_services.Postgres, redis: dev_services.Redis, fault: str
) -> None:
    with serving(**settings) as service:
        service.wait()
        new = {"amount": 1, "currency": "EUR", "reference": "redis"}
        first = service.http.post("/payments", json=new, headers={"Idempotency-Key": str(uuid4())})
        paths = [first.headers["location"]]
        normal = statistics.quantiles(seconds(service, 100, paths), n=100)[98]
        if fault == "dead":
            redis.stop()
            away = statistics.quantiles(seconds(service, 200, paths), n=100)[98]
            redis.start()
        else:
            with frozen(redis.pid):
                away = statistics.quantiles(seconds(service, 200, paths), n=100)[98]
        print(f"{fault}: p99 {normal * 1000:.0f} ms, {away * 1000:.0f} ms while Redis is away")
        assert away < normal + 0.3
        eventually(lambda: sql(postgres.url, "select count(*) from outbox")[0][0] == 0)
        assert "Traceback" not in service.text


@pytest.mark.parametrize("answer", ["down", "late"])
def test_a_gateway_that_fails_for_long_touches_nobody_and_is_called_rarely(
    settings: dict[str, str], bank: Gateway, postgres: dev_services.Postgres, answer: str
) -> None:
    run, outage = uuid4().hex[:8], 30.0 if answer == "down" else 10.0
    with serving(**settings) as service, consuming(1, **settings) as (consumer,):
        service.wait()
        eventually(consumer.is_ready)
        shop = Shop(service)
        shop.run(50, f"{run} before")
        eventually(lambda: settled(postgres.url, run), SETTLED_SECONDS)
        bank.status, bank.delay_seconds = (503, 0.0) if answer == "down" else (0, 6.0)
        begin, before = time.monotonic(), bank.calls.total()
        number = 0
        while time.monotonic() - begin < outage:
            shop.pay(f"{run} {number}")
            number += 1
            assert service.get("/health/ready").status_code == 200
            assert consumer.is_ready()
            time.sleep(0.1)
        calls, lasted = bank.calls.total() - before, time.monotonic() - begin
        bank.status, bank.delay_seconds, back = 0, 0.0, time.monotonic()
        eventually(lambda: settled(postgres.url, run), SETTLED_SECONDS)
        later = time.monotonic() - back
        print(
            f"{answer}: {calls} calls in {outage:.0f} s; {number} payments are settled {later:.1f} s after it"
        )
        if answer == "down":
            assert calls <= 8 + lasted / 3 + 2  # until it is left alone; then one for each 3 s
            assert later < 15
    assert set(shop.statuses) == {"201"}
    assert set(bank.charges.values()) == {1}
