"""The start of a job is a span in the trace of the request that has created the job."""

import asyncio
from collections.abc import Iterator

import pytest

from app.storage.postgres import Database
from app.telemetry.context import request_context
from tests.jobs.conftest import Start, ended, enqueue
from tests.jobs.work import Seconds
from tests.otlp_receiver import Receiver, receiving

pytestmark = pytest.mark.process

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
#: As `enqueue` stores them within a request that is traced.
IDS = {"request_id": "r-1", "traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


async def test_start_of_a_job_is_a_span_in_the_trace_of_its_request(
    database: Database, start: Start, receiver: Receiver
) -> None:
    worker = start(OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url, OTEL_BSP_SCHEDULE_DELAY="50")
    token = request_context.set(IDS)
    job_id = await enqueue(database, "compute", Seconds())
    await enqueue(database, "unknown")
    request_context.reset(token)
    await ended(database, job_id)
    for name in ("process compute", "process unknown"):
        await asyncio.to_thread(receiver.wait_for, name)

    (span,) = receiver.named("process compute")
    assert (span.kind, span.trace_id, span.parent) == ("CONSUMER", TRACE_ID, "00f067aa0ba902b7")
    assert span.attributes["messaging.message.id"] == str(job_id)
    assert not span.is_failed
    # A worker tries it again: a newer one may know the type.
    failed, *_ = receiver.named("process unknown")
    assert (failed.attributes["error.type"], failed.trace_id) == ("LookupError", TRACE_ID)
    queries = {each.name for each in receiver.spans if each.parent == span.span_id}
    assert "UPDATE jobs" in queries
    # Those of the processes that compute as well
    lines = [line for line in worker.lines if line.get("job_id") == str(job_id)]
    assert {line["trace_id"] for line in lines} == {TRACE_ID}
    assert {line["span_id"] for line in lines} == {span.span_id}
    assert not any("traceparent" in line for line in lines)
