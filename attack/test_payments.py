"""Payments under faults: none is lost and none is charged twice.

Processes are killed, Postgres and Redis are restarted, the gateway fails. The controls run without
the idempotency key, or without the inbox, and must duplicate some: so the tests can fail.
"""

import contextlib
import json
import random
import signal
import statistics
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
from app.settings import Settings
from redis import Redis as Client
from redis.exceptions import RedisError
from scripts.fake_gateway import FakeGateway
from tests.payments.conftest import gateway  # noqa: F401 - a fixture
from tests.payments.test_consumer import Consumer
from tests.service_process import Service, eventually, frozen, serving

from scripts import dev_services
from test_faults import durable, sql, workers  # noqa: F401 - durable is a fixture

CLIENTS = 12
#: Time limit for a payment to be settled once everything works again.
SETTLED_SECONDS = 30
STREAM = f"{Settings().redis_key_prefix}:payment-events"
#: Time limit for a consumer to end after SIGTERM.
STOP_SECONDS = 20
FAULT_STEPS = 36
PAYMENTS = 2000


def restart(consumer: Consumer, number: int) -> None:
    """Stop a consumer by a signal and start it again, as a platform does."""
    consumer.process.send_signal(number)
    consumer.process.wait(STOP_SECONDS)
    consumer.process = consumer.start()


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
            assert consumer.process.wait(STOP_SECONDS) == 0
            consumer.output.close()


class Tail:
    """Counts published events by payment, across restarts of Redis that lose them."""

    def __init__(self, url: str) -> None:
        self.client: Any = Client.from_url(url, socket_timeout=10)
        self.events = Counter[str]()
        self.lock = threading.Lock()
        #: The last entry that was read. It is a time, which also grows over a loss.
        self.last = b"-"

    def read(self) -> None:
        """Count the new events."""
        with self.lock:
            for entry, fields in self.client.xrange(STREAM, self.last):
                self.last = b"(" + entry
                self.events[json.loads(fields[b"payload"])["payment_id"]] += 1

    def stop(self, redis: dev_services.Redis) -> None:
        """Stop Redis after its last event was counted: it is paused for writes, read, killed."""
        self.client.client_pause(10_000, all=False)
        self.read()
        redis.stop()


@contextlib.contextmanager
def tailing(url: str) -> Iterator[Tail]:
    """Count the events during the block."""
    tail = Tail(url)
    stop = threading.Event()

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
    """Sends payments, each until it is acknowledged.

    All attempts for one payment have the same key; as a control, a new one each.
    """

    def __init__(self, service: Service, one_key: bool = True, pause_seconds: float = 0) -> None:
        self.service = service
        self.one_key = one_key
        self.pause_seconds = pause_seconds
        #: The IDs of acknowledged payments, by reference.
        self.acknowledged: dict[str, str] = {}
        self.statuses: Counter[str] = Counter()

    def pay(self, reference: str) -> None:
        """Send a payment until it is acknowledged."""
        key = str(uuid4())
        time.sleep(random.uniform(0, self.pause_seconds))
        while reference not in self.acknowledged:
            if not self.one_key:
                key = str(uuid4())
            try:
                self._send(reference, key)
            except httpx.TransportError as error:
                self.statuses[type(error).__name__] += 1
            if reference not in self.acknowledged:
                time.sleep(random.uniform(0, 0.1))

    def _send(self, reference: str, key: str) -> None:
        new = {"amount": 1, "currency": "EUR", "reference": reference}
        headers = {"Idempotency-Key": key}
        response = self.service.http.post("/payments", json=new, headers=headers, timeout=8)
        self.statuses[str(response.status_code)] += 1
        assert response.status_code in {201, 409, 503, 504}, response.text
        if response.status_code == 201:
            self.acknowledged[reference] = response.json()["payment_id"]

    def run(self, number: int, run: str) -> None:
        """Send a number of payments."""
        with ThreadPoolExecutor(CLIENTS) as threads:
            list(threads.map(self.pay, [f"{run} {each}" for each in range(number)]))

    def run_until(self, end: threading.Event, run: str) -> None:
        """Send payments from all clients until the event is set."""

        def send(client: int) -> None:
            for each in count():
                if end.is_set():
                    return
                self.pay(f"{run} {client}-{each}")

        with ThreadPoolExecutor(CLIENTS) as threads:
            list(threads.map(send, range(CLIENTS)))


@contextlib.contextmanager
def paying(shop: Shop, run: str) -> Iterator[None]:
    """Send payments during the block, then wait until the last ones are acknowledged."""
    end = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(shop.run_until, end, run)
        try:
            yield
        finally:
            end.set()
        running.result()


def kill_a_worker(service: Service, number: int) -> bool:
    """Signal one of the workers; return False if there is none."""
    with contextlib.suppress(psutil.NoSuchProcess, httpx.TransportError, IndexError):
        random.choice(workers(service)).send_signal(number)
        return True
    return False


def is_settled(url: str, run: str) -> bool:
    """Return whether every payment of a run is settled."""
    query = "select count(*) from payments where reference like $1 || ' %' and status <> 'settled'"
    ((unsettled,),) = sql(url, query, run)
    return bool(unsettled == 0)


def post(service: Service, reference: str) -> httpx.Response:
    """Create a payment with a new key."""
    new = {"amount": 1, "currency": "EUR", "reference": reference}
    return service.http.post("/payments", json=new, headers={"Idempotency-Key": str(uuid4())})


@pytest.fixture
def settings(urls: dict[str, str], gateway: FakeGateway) -> dict[str, str]:  # noqa: F811
    # A consumer would also charge the pending payments of other tests.
    sql(urls["DATABASE_URL"], "truncate payments, outbox, inbox, idempotency_keys")
    return urls | {
        "GATEWAY_URL": gateway.url,
        "GRACEFUL_TIMEOUT_SECONDS": "20",
        "REQUEST_TIMEOUT_SECONDS": "6",
    }


class Faults:
    """Kills and restarts the processes behind a payment, step by step."""

    def __init__(
        self,
        service: Service,
        consumers: list[Consumer],
        tail: Tail,
        postgres: dev_services.Postgres,
        redis: dev_services.Redis,
    ) -> None:
        self.service = service
        self.consumers = consumers
        self.tail = tail
        self.postgres = postgres
        self.redis = redis
        self.kills = Counter[str]()

    def run(self, step: int) -> None:
        """Do the fault of a step: mostly of a worker, sometimes of a consumer or a server."""
        number = signal.SIGKILL if step % 2 else signal.SIGTERM
        if step in {8, 27}:
            self.tail.stop(self.redis)
            time.sleep(0.5)
            self.redis.start()
            self.kills["Redis"] += 1
        elif step == 18:
            self.postgres.stop("immediate")
            time.sleep(0.5)
            self.postgres.start()
            self.kills["Postgres"] += 1
        elif step % 4 == 0:
            restart(random.choice(self.consumers), number)
            self.kills["consumer"] += 1
        else:
            self.kills["worker"] += kill_a_worker(self.service, number)


def test_faults_lose_and_duplicate_no_payment(
    settings: dict[str, str],
    gateway: FakeGateway,  # noqa: F811
    postgres: dev_services.Postgres,
    redis: dev_services.Redis,
) -> None:
    run = uuid4().hex[:8]
    with (
        serving(**settings) as service,
        consuming(2, **settings) as consumers,
        tailing(redis.url) as tail,
    ):
        service.wait()
        shop = Shop(service, pause_seconds=0.3)
        faults = Faults(service, consumers, tail, postgres, redis)
        begin = time.monotonic()
        with paying(shop, run):
            for step in range(FAULT_STEPS):
                time.sleep(0.4)
                faults.run(step)
            eventually(lambda: len(shop.acknowledged) >= PAYMENTS, 300)
        created = time.monotonic()
        eventually(lambda: is_settled(postgres.url, run), SETTLED_SECONDS + 60)
        settled = time.monotonic()
        print(f"{created - begin:.1f} s, settled {settled - created:.1f} s later")
        print(f"{dict(faults.kills)}; {dict(shop.statuses)}")
        time.sleep(1)  # for a late second call or event
        # A consumer that is stopped while it starts would not end with 0.
        eventually(lambda: all(consumer.is_ready() for consumer in consumers))
        query = """
            select payment_id::text, reference from payments where reference like $1 || ' %'
        """
        rows = sql(postgres.url, query, run)
    stored = {row["reference"]: row["payment_id"] for row in rows}
    assert faults.kills["worker"] >= 20
    assert len(rows) >= PAYMENTS
    assert len(stored) == len(rows)
    assert stored == shop.acknowledged
    assert set(stored.values()) <= set(tail.events)
    assert {gateway.charges[payment_id] for payment_id in stored.values()} == {1}
    assert gateway.charges.total() == len(rows)
    calls = gateway.calls.total()
    print(f"{len(rows)} payments, {calls} gateway calls, {tail.events.total()} events")


def test_control_with_a_new_key_per_attempt_duplicates_payments(
    settings: dict[str, str], postgres: dev_services.Postgres
) -> None:
    run = uuid4().hex[:8]
    query = """
        select count(*) - count(distinct reference) from payments where reference like $1 || ' %'
    """
    duplicates = 0
    with serving(**settings) as service:
        service.wait()
        shop = Shop(service, one_key=False)
        latest = time.monotonic() + 120
        with paying(shop, run):
            while time.monotonic() < latest:
                if duplicates and len(shop.acknowledged) >= PAYMENTS:
                    break
                time.sleep(0.3)
                kill_a_worker(service, signal.SIGKILL)
                ((duplicates,),) = sql(postgres.url, query, run)
    print(f"{duplicates} of {len(shop.acknowledged)} are duplicates; {dict(shop.statuses)}")
    assert duplicates


@contextlib.contextmanager
def counting_effects(url: str) -> Iterator[None]:
    """Add a row to the table `effects` for each update of a payment's status, by a trigger."""
    sql(url, "create table if not exists effects (payment_id uuid)")
    sql(url, "truncate effects")
    add_effect = """
        create or replace function effect() returns trigger language plpgsql as $$
        begin
            insert into effects values (new.payment_id);
            return new;
        end $$
    """
    sql(url, add_effect)
    trigger = """
        create or replace trigger effect after update of status on payments
        for each row execute function effect()
    """
    sql(url, trigger)
    try:
        yield
    finally:
        sql(url, "drop trigger effect on payments")


@pytest.mark.parametrize("module", ["app.payments.consumer", "consumer_without_inbox"])
def test_republished_event_settles_once_only_with_the_inbox(
    settings: dict[str, str],
    postgres: dev_services.Postgres,
    redis: dev_services.Redis,
    module: str,
) -> None:
    """Republish as a relay does that is killed between the publication and the commit."""
    run = uuid4().hex[:8]
    client: Any = Client.from_url(redis.url)
    with counting_effects(postgres.url):
        with serving(**settings) as service, consuming(2, module, **settings) as consumers:
            service.wait()
            eventually(lambda: all(consumer.is_ready() for consumer in consumers))
            shop = Shop(service)
            with ThreadPoolExecutor(1) as thread:
                running = thread.submit(shop.run, 200, run)
                while not running.done():
                    for _, fields in client.xrevrange(STREAM, count=5):
                        client.xadd(STREAM, fields)
                    time.sleep(0.05)
                running.result()
            eventually(lambda: is_settled(postgres.url, run), SETTLED_SECONDS)
            eventually(lambda: client.xinfo_groups(STREAM)[0]["pending"] == 0, SETTLED_SECONDS)
        query = """
            select max(n) as most, sum(n) as total
            from (select count(*) as n from effects group by payment_id) as by_payment
        """
        ((most, total),) = sql(postgres.url, query)
    print(f"{module}: {total} effects of 200 payments")
    assert (most == 1) == (module == "app.payments.consumer")


def test_50_requests_with_one_key_create_one_payment(
    settings: dict[str, str], postgres: dev_services.Postgres
) -> None:
    reference = str(uuid4())
    new = {"amount": 1, "currency": "EUR", "reference": reference}
    headers = {"Idempotency-Key": reference}
    client: Any = Client.from_url(settings["REDIS_URL"])
    with serving(**settings) as service:
        service.wait()

        def send(_: int) -> httpx.Response:
            return service.http.post("/payments", json=new, headers=headers)

        with ThreadPoolExecutor(50) as threads:
            responses = list(threads.map(send, range(50)))
        outcomes = Counter(
            (response.status_code, response.headers.get("idempotent-replayed"))
            for response in responses
        )
        print(dict(outcomes))
        assert outcomes[201, None] == 1
        assert set(outcomes) <= {(201, None), (201, "true"), (409, None)}
        created = {response.content for response in responses if response.status_code == 201}
        assert len(created) == 1
        query = "select payment_id::text from payments where reference = $1"
        ((payment_id,),) = sql(postgres.url, query, reference)

        def events() -> list[bytes]:
            payloads = [fields[b"payload"] for _, fields in client.xrange(STREAM)]
            return [payload for payload in payloads if payment_id.encode() in payload]

        eventually(lambda: len(events()) == 1)
        time.sleep(1)
        assert len(events()) == 1


def request_seconds(service: Service, number: int, path: str) -> list[float]:
    """Create and read payments, one at a time; return the duration of each request."""
    found = []
    for _ in range(number):
        created = post(service, "redis")
        read = service.get(path)
        assert created.status_code == 201
        assert read.status_code == 200
        assert service.get("/health/ready").status_code == 200
        found += [created.elapsed.total_seconds(), read.elapsed.total_seconds()]
    return found


def percentile_99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


@contextlib.contextmanager
def redis_outage(redis: dev_services.Redis, fault: str) -> Iterator[None]:
    """Stop or suspend Redis during the block."""
    if fault == "hung":
        with frozen(redis.pid):
            yield
        return
    redis.stop()
    try:
        yield
    finally:
        redis.start()


@pytest.mark.parametrize("fault", ["stopped", "hung"])
def test_redis_outage_does_not_slow_payments_down(
    settings: dict[str, str], postgres: dev_services.Postgres, redis: dev_services.Redis, fault: str
) -> None:
    with serving(**settings) as service:
        service.wait()
        path = post(service, "redis").headers["location"]
        normal = percentile_99(request_seconds(service, 100, path))
        with redis_outage(redis, fault):
            during_outage = percentile_99(request_seconds(service, 200, path))
        print(f"{fault}: p99 {normal * 1000:.0f} ms, {during_outage * 1000:.0f} ms in the outage")
        assert during_outage < normal + 0.3
        eventually(lambda: sql(postgres.url, "select count(*) from outbox")[0][0] == 0)
        assert "Traceback" not in service.text


#: Per behavior of the gateway: its status, its delay in seconds, and the duration of the outage.
GATEWAY_OUTAGES = {"failing": (503, 0.0, 30.0), "late": (0, 6.0, 10.0)}


@pytest.mark.parametrize("behavior", GATEWAY_OUTAGES)
def test_long_gateway_outage_affects_no_client_and_few_calls(
    settings: dict[str, str],
    gateway: FakeGateway,  # noqa: F811
    postgres: dev_services.Postgres,
    behavior: str,
) -> None:
    run = uuid4().hex[:8]
    status, delay_seconds, outage_seconds = GATEWAY_OUTAGES[behavior]
    with serving(**settings) as service, consuming(1, **settings) as (consumer,):
        service.wait()
        eventually(consumer.is_ready)
        shop = Shop(service)
        shop.run(50, f"{run} before")
        eventually(lambda: is_settled(postgres.url, run), SETTLED_SECONDS)
        gateway.status = status
        gateway.delay_seconds = delay_seconds
        calls_before = gateway.calls.total()
        begin = time.monotonic()
        payments = 0
        while time.monotonic() - begin < outage_seconds:
            shop.pay(f"{run} {payments}")
            payments += 1
            assert service.get("/health/ready").status_code == 200
            assert consumer.is_ready()
            time.sleep(0.1)
        calls = gateway.calls.total() - calls_before
        lasted = time.monotonic() - begin
        gateway.status = 0
        gateway.delay_seconds = 0.0
        end = time.monotonic()
        eventually(lambda: is_settled(postgres.url, run), SETTLED_SECONDS)
        settled_after = time.monotonic() - end
        print(f"{behavior}: {calls} calls in {outage_seconds:.0f} s")
        print(f"{payments} payments are settled {settled_after:.1f} s after the outage")
        if behavior == "failing":
            # Until the circuit opens; then one in 3 s.
            assert calls <= 8 + lasted / 3 + 2
            assert settled_after < 15
    assert set(shop.statuses) == {"201"}
    assert set(gateway.charges.values()) == {1}
