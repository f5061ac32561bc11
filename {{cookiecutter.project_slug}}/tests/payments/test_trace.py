"""One trace from the request to the settled payment, over three processes."""

import json
import re
from collections.abc import Iterator

import pytest
from redis import Redis as Client

from scripts import dev_services
from scripts.fake_gateway import Call, FakeGateway, run_gateway
from tests.otlp_receiver import Receiver, Span, receiving
from tests.payments.test_consumer import STREAM, Consumer, consuming, pay, status
from tests.service_process import Service, eventually, serving

pytestmark = pytest.mark.process

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
NOT_SAMPLED = f"00-{TRACE_ID}-00f067aa0ba902b7-00"


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def gateway() -> Iterator[FakeGateway]:
    with run_gateway() as gateway:
        yield gateway


@pytest.fixture(scope="module")
def variables(
    database_url: str, redis: dev_services.Redis, gateway: FakeGateway, receiver: Receiver
) -> dict[str, str]:
    return {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis.url,
        "GATEWAY_URL": gateway.url,
        "LOG_FORMAT": "json",
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
        "OTEL_BSP_SCHEDULE_DELAY": "50",
    }


@pytest.fixture(scope="module")
def service(variables: dict[str, str]) -> Iterator[Service]:
    with serving(WEB_CONCURRENCY="1", **variables) as service:
        service.wait()
        yield service


@pytest.fixture(scope="module")
def consumer(variables: dict[str, str]) -> Iterator[Consumer]:
    with consuming(**variables) as consumer:
        yield consumer


def test_payment_is_one_trace_from_its_request_until_it_is_settled(
    service: Service, consumer: Consumer, gateway: FakeGateway, receiver: Receiver
) -> None:
    """OpenTelemetry: "Semantic conventions for messaging spans"; W3C Trace Context.

    The processes are the API, the consumer and the gateway, which gets `traceparent`.
    """
    payment_id = pay(service)
    eventually(lambda: status(service, payment_id) == "settled")
    (call,) = calls(gateway, payment_id)
    trace_id = call.headers["traceparent"].split("-")[1]

    def roots() -> list[Span]:
        """Of this payment: spans of other tests may arrive late."""
        return [span for span in receiver.named("POST /payments") if span.trace_id == trace_id]

    receiver.wait(lambda _: roots())
    (root,) = roots()
    eventually(lambda: "CONSUMER" in [span.kind for span in receiver.trace(root)])
    spans = receiver.trace(root)

    by_id = {span.span_id: span for span in spans}
    orphans = [span.name for span in spans if span is not root and span.parent not in by_id]
    assert orphans == []
    (send,) = [span for span in spans if span.kind == "PRODUCER"]
    (process,) = [span for span in spans if span.kind == "CONSUMER"]
    (charge,) = [span for span in spans if span.name == "POST"]
    assert "WITH idempotency_keys" in names(spans, root)
    assert (send.name, send.parent) == ("send payment-events", root.span_id)
    assert (process.name, process.parent) == ("process payment-events", send.span_id)
    assert names(spans, process) >= {"SELECT payments", "POST", "WITH inbox"}
    assert charge.parent == process.span_id
    assert charge.attributes["url.full"] == f"{gateway.url}/charges"
    assert charge.attributes["http.response.status_code"] == 201
    assert call.headers["traceparent"].startswith(f"00-{root.trace_id}-{charge.span_id}-")
    instances = {span.resource["service.instance.id"] for span in spans}
    assert len(instances) == 2
    assert process.attributes["messaging.destination.name"] == "payment-events"
    # Nothing of the payment
    assert not any("consumer" in span.attributes.values() for span in spans)
    # Not as a part of a port or an ID
    amount = re.compile(r"(?<![\w-])1250(?![\w-])")
    assert not any(amount.search(json.dumps(span.attributes)) for span in spans)


def calls(gateway: FakeGateway, payment_id: str) -> list[Call]:
    """Return the requests for a payment. Those of events that other tests left come as well."""
    return [call for call in gateway.requests if call.headers["Idempotency-Key"] == payment_id]


def names(spans: list[Span], parent: Span) -> set[str]:
    """Return the names of the children of a span."""
    return {span.name for span in spans if span.parent == parent.span_id}


def test_caller_decides_for_the_consumer_as_well(
    service: Service, consumer: Consumer, gateway: FakeGateway, receiver: Receiver
) -> None:
    payment_id = pay(service, traceparent=NOT_SAMPLED)
    eventually(lambda: status(service, payment_id) == "settled")
    next_id = pay(service)
    eventually(lambda: status(service, next_id) == "settled")
    receiver.wait(lambda _: len(receiver.named("process")) >= 1)
    assert [span for span in receiver.spans if span.trace_id == TRACE_ID] == []
    (call,) = calls(gateway, payment_id)
    first = call.headers["traceparent"]
    # The lowest bit: not sampled
    assert first.startswith(f"00-{TRACE_ID}-")
    assert int(first.rpartition("-")[2], 16) & 1 == 0


def test_failed_charge_is_a_failed_span_and_its_retry_another_one(
    service: Service, consumer: Consumer, gateway: FakeGateway, receiver: Receiver
) -> None:
    gateway.status = 503
    payment_id = pay(service)
    eventually(lambda: calls(gateway, payment_id))
    trace_id = calls(gateway, payment_id)[0].headers["traceparent"].split("-")[1]

    def attempts() -> list[Span]:
        spans = [span for span in receiver.named("POST") if span.kind == "CLIENT"]
        return [span for span in spans if span.trace_id == trace_id]

    receiver.wait(lambda _: len(attempts()) >= 3)
    gateway.status = 0
    eventually(lambda: status(service, payment_id) == "settled")
    failed = [span for span in attempts() if span.is_failed]
    assert {span.attributes["error.type"] for span in failed} == {"503"}
    assert len(failed) >= 3


def test_event_of_a_publisher_without_traces_begins_a_trace(
    service: Service, consumer: Consumer, receiver: Receiver, redis: dev_services.Redis
) -> None:
    receiver.clear()
    with Client.from_url(redis.url) as client:
        client.xadd(STREAM, {"event_id": "not an event", "traceparent": "\xff nothing"})

    def roots() -> list[Span]:
        return [span for span in receiver.named("process") if span.parent == ""]

    receiver.wait(lambda _: roots())
    (process,) = roots()
    assert process.attributes["error.type"] == "PoisonError"
