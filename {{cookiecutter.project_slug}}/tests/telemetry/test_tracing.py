"""Traces over sockets, read by a receiver of OTLP with protobuf's strict reader."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import SpanContext, TraceFlags

from app.settings import Settings
from app.telemetry.trace_export import sampler_of
from app.telemetry.tracing import within
from scripts import dev_services
from tests.otlp_receiver import Receiver, Span, receiving
from tests.patience import slowness
from tests.service_process import PROJECT, Service, eventually, serving
from tests.trace_routes import SECRET

pytestmark = pytest.mark.process

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
NOT_SAMPLED = f"00-{TRACE_ID}-00f067aa0ba902b7-00"
#: The last requests of each run, whose spans must arrive.
LAST = 300


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture(autouse=True)
def empty(receiver: Receiver) -> None:
    receiver.response = 200
    receiver.clear()


@pytest.fixture(scope="module")
def urls(database_url: str, redis: dev_services.Redis) -> dict[str, str]:
    return {"DATABASE_URL": database_url, "REDIS_URL": redis.url, "LOG_FORMAT": "json"}


@pytest.fixture(scope="module")
def traced(urls: dict[str, str], receiver: Receiver) -> Iterator[Service]:
    settings = urls | {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20letmein",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        "OTEL_RESOURCE_ATTRIBUTES": "team=checkout",
        "SERVICE_VERSION": "1.2.3",
        "ACCESS_LOG_FLUSH_MS": "0",
    }
    with serving("tests.trace_routes:app", **settings) as service:
        service.wait()
        yield service


def children(receiver: Receiver, parent: Span) -> list[Span]:
    return [span for span in receiver.named("") if span.parent == parent.span_id]


def test_request_is_a_server_span_with_all_that_it_calls(
    traced: Service, receiver: Receiver
) -> None:
    """OpenTelemetry: "Semantic conventions for HTTP spans", "... for database client calls"."""
    assert traced.get("/items/42?token=letmein").status_code == 200
    server = receiver.wait_for("GET /items/{number}")
    assert (server.kind, server.parent, server.is_failed) == ("SERVER", "", False)
    assert server.attributes == {
        "http.request.method": "GET",
        "http.response.status_code": 200,
        "http.route": "/items/{number}",
        "url.path": "/items/42",
        "url.scheme": "http",
        "client.address": "127.0.0.1",
    }
    assert [(span.name, span.kind) for span in children(receiver, server)] == [
        ("BEGIN", "CLIENT"),
        ("SELECT pg_class", "CLIENT"),
        ("COMMIT", "CLIENT"),
        ("SET", "CLIENT"),
        ("PIPELINE", "CLIENT"),
        ("own", "INTERNAL"),
    ]
    _, query, _, command, pipeline, _ = children(receiver, server)
    expected = {
        "db.system.name": "postgresql",
        "db.operation.name": "SELECT",
        "db.collection.name": "pg_class",
        "db.query.text": "select count(*) from pg_class where relname <> $1 and relname <> ?",
    }
    assert expected.items() <= query.attributes.items()
    assert query.attributes.keys() - expected == {"db.namespace", "server.address", "server.port"}
    assert command.attributes["db.system.name"] == "redis"
    assert pipeline.attributes["db.operation.batch.size"] == 2


def test_spans_carry_no_value_password_or_token(traced: Service, receiver: Receiver) -> None:
    traced.get(f"/items/1?token={SECRET}", Authorization=f"Bearer {SECRET}", Cookie=SECRET)
    for path in ("/failing-query", "/bug", "/unavailable"):
        traced.get(path)
    receiver.wait(lambda spans: len(requests_of(spans)) >= 4)
    assert receiver.spans
    assert [span for span in receiver.spans if SECRET in span.wire] == []
    assert [span for span in receiver.spans if "letmein" in span.wire] == []


def test_resource_names_the_service_and_the_process(traced: Service, receiver: Receiver) -> None:
    """OpenTelemetry: "Resource semantic conventions"; variables add to ours."""
    traced.get("/")
    server = receiver.wait_for("GET /")
    assert server.resource["service.name"] == Settings.model_fields["service_name"].default
    assert server.resource["service.version"] == "1.2.3"
    assert server.resource["deployment.environment.name"] == "production"
    assert server.resource["team"] == "checkout"
    assert server.resource["service.instance.id"].rpartition("-")[2].isdigit()


def test_headers_of_the_exporter_are_decoded(traced: Service, receiver: Receiver) -> None:
    traced.get("/")
    receiver.wait(bool)
    assert {each["authorization"] for each in receiver.headers} == {"Bearer letmein"}
    assert {each["Content-Encoding"] for each in receiver.headers} == {"gzip"}


@pytest.mark.parametrize(
    ("path", "status", "error"),
    [
        ("/bug", 500, "ZeroDivisionError"),
        ("/unavailable", 503, "503"),
        ("/failing-query", 500, "InvalidTextRepresentationError"),
        ("/nothing", 404, None),
    ],
)
def test_failed_request_has_an_error_type_from_500_on(
    traced: Service, receiver: Receiver, path: str, status: int, error: str | None
) -> None:
    assert traced.get(path).status_code == status
    name = "GET" if status == 404 else f"GET {path}"
    server = receiver.wait_for(name)
    assert server.is_failed is (status >= 500)
    assert server.attributes.get("error.type") == error
    assert server.attributes["http.response.status_code"] == status


def test_failed_query_has_its_sqlstate(traced: Service, receiver: Receiver) -> None:
    """22P02: invalid_text_representation (PostgreSQL, Appendix A)."""
    traced.get("/failing-query")
    query = receiver.wait_for("SELECT")
    assert query.is_failed
    assert query.attributes["error.type"] == "22P02"


def test_feature_adds_to_the_span_of_its_request(traced: Service, receiver: Receiver) -> None:
    """OpenTelemetry, "Tracing API", section "Span": the active span is that of the request."""
    assert traced.get("/annotated").status_code == 200
    server = receiver.wait_for("GET /annotated")
    assert server.attributes["order.id"] == 7
    assert server.attributes["http.route"] == "/annotated"
    assert "priced" in server.wire
    names = [(span.name, span.trace_id) for span in children(receiver, server)]
    assert names == [("before", server.trace_id), ("after", server.trace_id)]
    assert [span.kind for span in receiver.trace(server)] == ["SERVER", "INTERNAL", "INTERNAL"]


def test_caller_decides_by_its_flag(traced: Service, receiver: Receiver) -> None:
    """W3C Trace Context, section 3.2.2.5: the flag `sampled`."""
    trace_id = uuid4().hex
    for _ in range(5):
        traced.get("/items/1", traceparent=f"00-{trace_id}-00f067aa0ba902b7-01")
        traced.get("/items/2", traceparent=f"00-{trace_id}-00f067aa0ba902b7-00")

    def found() -> list[Span]:
        return [each for each in receiver.named("GET /items") if each.trace_id == trace_id]

    eventually(lambda: len(found()) >= 5)
    assert {span.attributes["url.path"] for span in found()} == {"/items/1"}
    assert {span.parent for span in found()} == {"00f067aa0ba902b7"}


def test_log_lines_carry_the_active_span(traced: Service, receiver: Receiver) -> None:
    """OpenTelemetry, "Trace Context in non-OTLP Log Formats": trace_id and span_id."""
    traced.get("/items/7", **{"X-Request-ID": "lines"})
    server = receiver.wait_for("GET /items/{number}")
    lines = {line["message"]: line for line in traced.lines if line.get("request_id") == "lines"}
    own = receiver.named("own")[-1]
    for message, span in (("request", server), ("within the request", server)):
        assert lines[message]["trace_id"] == span.trace_id
        assert lines[message]["span_id"] == span.span_id
    assert lines["within a span"]["span_id"] == own.span_id
    assert lines["within a span"]["trace_id"] == server.trace_id
    assert {line["trace_flags"] for line in lines.values()} == {"01"}


def test_lines_of_a_request_that_is_not_sampled_carry_ids(traced: Service) -> None:
    traced.get("/after", traceparent=NOT_SAMPLED, **{"X-Request-ID": "unsampled"})
    eventually(lambda: "after the response" in traced.messages)
    lines = [line for line in traced.lines if line.get("request_id") == "unsampled"]
    assert {line["trace_id"] for line in lines} == {TRACE_ID}
    assert len({line["span_id"] for line in lines}) == 1
    assert {line["trace_flags"] for line in lines} == {"00"}
    assert lines[0]["parent_span_id"] == "00f067aa0ba902b7"


def test_probes_have_no_spans(traced: Service, receiver: Receiver) -> None:
    trace_id = uuid4().hex
    header = f"00-{trace_id}-00f067aa0ba902b7-01"
    for path in ("/health/live", "/health/ready", "/health/startup", "/"):
        assert traced.get(path, traceparent=header).status_code == 200
    traced.metrics()
    eventually(lambda: trace_id in [span.trace_id for span in receiver.spans])
    found = [span.name for span in receiver.spans if span.trace_id == trace_id]
    assert found == ["GET /"]


def test_span_of_a_websocket_is_its_handshake(traced: Service, receiver: Receiver) -> None:
    """A WebSocket may last for days: what it does then is in no span."""
    with traced.websocket("/socket") as websocket:
        websocket.send("a")
        assert websocket.recv() == "1"
        server = receiver.wait_for("GET /socket")
    assert server.attributes["http.response.status_code"] == 101
    traced.get("/")
    receiver.wait_for("GET /")
    assert children(receiver, server) == []


OPENMETRICS = {"Accept": "application/openmetrics-text; version=1.0.0"}
_EXEMPLAR = re.compile(
    r'^http_server_request_duration_seconds_bucket{.*http_route="/items/{number}".*le="([^"]+)".*} '
    r'[1-9].* # {span_id="(\w{16})",trace_id="(\w{32})"} (\S+) (\S+)$',
    re.MULTILINE,
)


def test_buckets_have_their_newest_trace_over_all_workers(
    traced: Service, receiver: Receiver
) -> None:
    """OpenMetrics, "Exemplars": a value within the bucket, and the time of the request."""
    start = time.time()
    for _ in range(20):
        traced.get("/items/1")

    def since_start(spans: list[Span]) -> list[Span]:
        return [span for span in requests_of(spans) if span.start > start]

    received = receiver.wait(lambda spans: len(since_start(spans)) == 20)
    spans = {span.span_id: span for span in since_start(received)}
    assert len(instances(list(spans.values()))) == 2

    def exemplars() -> list[tuple[str, ...]]:
        url = f"http://127.0.0.1:{traced.metrics_port}/metrics"
        text = traced.http.get(url, headers=OPENMETRICS).text
        return [match for match in _EXEMPLAR.findall(text) if float(match[4]) > start]

    newest = max(spans.values(), key=lambda span: span.start)
    # On a busy machine a worker may write its own later than a scrape.
    eventually(lambda: newest.span_id in [span_id for _, span_id, *_ in exemplars()])
    found = exemplars()
    for bound, span_id, trace_id, seconds, at in found:
        assert spans[span_id].trace_id == trace_id
        assert float(seconds) <= float(bound)
        assert float(seconds) == pytest.approx(spans[span_id].seconds, abs=0.01)
        assert start < float(at) < time.time()
    assert "trace_id" not in traced.metrics()


def requests_of(spans: list[Span]) -> list[Span]:
    return [span for span in spans if span.kind == "SERVER"]


def test_rejected_request_has_a_span(traced: Service, receiver: Receiver) -> None:
    response = traced.http.post("/items/1", content=bytes(2 << 20))
    assert response.status_code == 413
    receiver.wait(
        lambda spans: 413 in [span.attributes.get("http.response.status_code") for span in spans]
    )


@pytest.mark.parametrize(
    "name",
    [
        *("always_on", "always_off", "traceidratio"),
        *("parentbased_always_on", "parentbased_always_off", "parentbased_traceidratio"),
    ],
)
def test_sampling_without_the_sdk_decides_as_its_sampler(name: Any) -> None:
    """At 0.5: half of the bits below the bound, the bound itself, and the next."""
    settings = Settings(otel_traces_sampler=name, otel_traces_sampler_arg=0.5)
    sampler, sampling = sampler_of(settings)
    for trace_id in ((1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) + 1, 1):
        for flags in (None, 0, 1):
            parent = None if flags is None else SpanContext(trace_id, 1, True, TraceFlags(flags))
            result = sampler.should_sample(within(parent), trace_id, "GET")
            expected = result.decision is Decision.RECORD_AND_SAMPLE
            assert sampling.includes(trace_id, parent) is expected, (trace_id, flags)


def run(urls: dict[str, str], requests: int = 0, /, **settings: str) -> Any:
    """Run a service of one worker; send requests, then SIGTERM. Return seconds and log lines."""
    with serving(WEB_CONCURRENCY="1", RETIRE_SECONDS="0", **urls, **settings) as service:
        service.wait()
        for _ in range(requests):
            service.get("/")
        start = time.monotonic()
        assert service.stop() == 0
        return time.monotonic() - start, service.lines


def tracing_lines(lines: list[dict[str, Any]]) -> list[str]:
    """Return the lines about traces, and all warnings."""
    return [
        f"{line['logger']}: {line['message']}"
        for line in lines
        if line["logger"] == "app.tracing" or line["level"] in {"warning", "error", "critical"}
    ]


@pytest.fixture(scope="module")
def seconds_without_traces(urls: dict[str, str]) -> float:
    seconds, lines = run(urls)
    assert tracing_lines(lines) == []
    return float(seconds)


def test_last_spans_are_sent_at_sigterm(
    urls: dict[str, str], receiver: Receiver, seconds_without_traces: float
) -> None:
    """BatchSpanProcessor keeps them for 5 s, which a process that ends does not have."""
    settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url}
    seconds, lines = run(urls, LAST, **settings)
    assert len(receiver.named("GET /")) == LAST
    assert seconds - seconds_without_traces < 2 * slowness()
    assert tracing_lines(lines) == []


@pytest.mark.parametrize(
    ("response", "reason"),
    [(503, "503"), (0, "timeout at shutdown"), (None, "ConnectionError")],
    ids=["rejecting", "frozen", "refusing"],
)
def test_collector_that_fails_costs_one_line_and_a_second(
    urls: dict[str, str],
    receiver: Receiver,
    seconds_without_traces: float,
    response: int | None,
    reason: str,
) -> None:
    """The SDK itself logs each batch, and waits for 30 s at the end."""
    url = receiver.url if response is not None else f"http://127.0.0.1:{dev_services.free_port()}"
    receiver.response = response or 0
    settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "50"}
    # Longer than the run, or than the first failure
    settings["OTEL_EXPORTER_OTLP_TIMEOUT"] = "60" if response == 0 else "0.2"
    seconds, lines = run(urls, LAST, **settings)
    assert seconds - seconds_without_traces < 2 * slowness()
    assert tracing_lines(lines) == [f"app.tracing: traces are lost: {reason}"]


def test_ratio_samples_that_part_of_the_requests(urls: dict[str, str], receiver: Receiver) -> None:
    settings = {
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{receiver.url}/v1/traces",
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": "0.2",
    }
    run(urls, 1000, **settings)
    # Five standard deviations: 63
    assert 137 < len(receiver.named("GET /")) < 263


def test_recycled_and_killed_workers_are_replaced_by_traced_ones(
    urls: dict[str, str], receiver: Receiver
) -> None:
    """opentelemetry-python #3307: an exporter that is made before the fork has no thread."""
    settings = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        "MAX_REQUESTS": "50",
        "MAX_REQUESTS_JITTER": "0",
        "WEB_CONCURRENCY": "1",
        "RETIRE_SECONDS": "0",
    }
    with serving(**urls, **settings) as service:
        service.wait()
        for _ in range(60):
            service.get("/")
        service.wait_for_workers(2)
        eventually(lambda: service.get("/") and len(instances(receiver.named(""))) >= 2)
        *_, newest = instances(receiver.named(""))
        os.kill(int(newest.rpartition("-")[2]), signal.SIGKILL)
        eventually(lambda: service.get("/") and instances(receiver.named(""))[-1] != newest)


def instances(spans: list[Span]) -> list[str]:
    """Return the workers of the spans, in their order; late spans of one change nothing."""
    return list(dict.fromkeys(span.resource["service.instance.id"] for span in spans))


def test_no_part_of_the_sdk_is_loaded_while_traces_are_off(urls: dict[str, str]) -> None:
    """FastAPI itself loads the API, and redis-py `opentelemetry.sdk.metrics`: 2 MB, shared."""
    code = """
import sys, asyncio
import gunicorn.app.wsgiapp
from app.main import app
from app.lifespan import open_state

async def main():
    async with open_state(app.state.settings):
        pass

asyncio.run(main())
packages = ("opentelemetry.sdk.trace", "opentelemetry.exporter", "google.protobuf", "requests")
print([name for name in sys.modules if name.startswith(packages)])
"""
    environment = os.environ | urls
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "[]", done


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"otel_exporter_otlp_endpoint": "http://c:4318", "otel_sdk_disabled": True},
        {"otel_exporter_otlp_endpoint": "http://c:4318", "otel_traces_exporter": "none"},
    ],
)
def test_traces_are_off_without_an_endpoint_or_if_disabled(variables: dict[str, Any]) -> None:
    """OpenTelemetry, "Environment Variable Specification"."""
    assert not Settings(**variables).has_traces
    assert Settings(otel_exporter_otlp_traces_endpoint="http://c:4318/v1/traces").has_traces
