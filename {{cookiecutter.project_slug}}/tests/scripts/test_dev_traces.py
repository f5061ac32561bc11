"""The local page of `make dev TRACE=1`."""

from collections.abc import Iterator

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from scripts import dev_traces
from tests.service_process import eventually


def export(url: str, trace: int, *names: str) -> None:
    """Send a trace: a span, and others within it."""
    request = ExportTraceServiceRequest()
    spans = request.resource_spans.add().scope_spans.add().spans
    for number, name in enumerate(names, 1):
        span = spans.add(name=name, trace_id=trace.to_bytes(16), span_id=number.to_bytes(8), kind=2)
        if number > 1:
            span.parent_span_id = (1).to_bytes(8)
        span.start_time_unix_nano = (trace * 100 + number) * 10**9
        span.end_time_unix_nano = span.start_time_unix_nano + 10**6
        span.attributes.add(key="http.route").value.string_value = "/<script>"
    response = httpx.post(f"{url}v1/traces", content=request.SerializeToString())
    assert response.status_code == 200


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACE", "1")
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "")
        with dev_traces.tracing() as url:
            eventually(lambda: httpx.get(url).status_code == 200)
            yield url


def test_traces_are_listed_newest_first_with_their_spans_in_order(page: str) -> None:
    export(page, 1, "GET /", "SELECT orders")
    export(page, 2, "GET /orders")
    export(page, 1, "GET /", "late")
    second, first = httpx.get(f"{page}traces").json()
    assert [span["name"] for span in second] == ["GET /orders"]
    assert [span["name"] for span in first] == ["GET /", "GET /", "SELECT orders", "late"]
    assert first[2]["parent"] == first[0]["id"]
    assert first[0]["attributes"] == {"http.route": "/<script>"}
    assert first[0]["end"] - first[0]["start"] == pytest.approx(1)


def test_page_inserts_nothing_as_markup() -> None:
    text = dev_traces.PAGE.read_text()
    assert "innerHTML" not in text
    assert "textContent" in text


def test_page_is_for_this_machine_only(page: str) -> None:
    """A name of an attacker that is rebound to 127.0.0.1 would read the traces."""
    assert httpx.get(page, headers={"Host": "attacker.example:4318"}).status_code == 403
    assert httpx.get(page).headers["Content-Type"] == "text/html; charset=utf-8"
    assert page.startswith("http://127.0.0.1:")


def test_what_is_no_trace_is_rejected(page: str) -> None:
    assert httpx.post(f"{page}v1/traces", content=b"\xff{}").status_code == 400
    assert httpx.post(f"{page}v1/logs", content=b"").status_code == 404


def test_without_trace_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACE", "0")
    with dev_traces.tracing() as url:
        assert url == ""


def test_only_the_newest_traces_are_kept() -> None:
    traces = dev_traces.Traces()
    request = ExportTraceServiceRequest()
    spans = request.resource_spans.add().scope_spans.add().spans
    for number in range(dev_traces.MAX_TRACES + 10):
        spans.add(trace_id=number.to_bytes(16), start_time_unix_nano=number)
    traces.add(request.SerializeToString())
    kept = traces.newest_first()
    assert len(kept) == dev_traces.MAX_TRACES
    assert kept[-1][0]["trace"] == (10).to_bytes(16).hex()
