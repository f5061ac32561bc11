"""Sends spans by OpenTelemetry's SDK and its exporter: OTLP over HTTP, in protobuf.

Only trace_setup.py imports it, and only if an endpoint is set. A collector that does not respond
costs one log line, and neither a request nor the shutdown: the exporter is a thread with a bounded
queue.
"""

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import requests
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.util.re import parse_env_headers
from prometheus_client import Counter

from app.settings import Settings
from app.tasks import StateLog
from app.telemetry.tracing import Sampling, TraceIds

#: Time limit for the last spans. It is a part of `server.CLOSING_SECONDS`.
FLUSH_SECONDS = 1.0
POLL_SECONDS = 0.02
#: The loggers of the SDK and of the exporter. They write a line for each failed batch, and one for
#: each span that meets a full queue; `SpanSender` counts both and logs the change.
#: That of the headers would show an invalid one, which is a secret.
NOISY_LOGGERS = (
    "opentelemetry.sdk._shared_internal",
    "opentelemetry.exporter",
    "opentelemetry.util.re",
)

_SPANS = Counter(
    "otel_sdk_exporter_span_exported",
    "Spans by the reason for which they were not sent, empty if they were.",
    ["error_type"],
)
logger = logging.getLogger("app.tracing")


class Export:
    """The SDK's provider of this process, and its exporter."""

    def __init__(self, settings: Settings) -> None:
        for name in NOISY_LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        sampler, self.sampling = sampler_of(settings)
        self.ids = _Ids()
        self.sender = SpanSender(settings)
        self.processor = BatchSpanProcessor(
            self.sender,
            max_queue_size=settings.otel_bsp_max_queue_size,
            schedule_delay_millis=settings.otel_bsp_schedule_delay,
            max_export_batch_size=min(
                settings.otel_bsp_max_export_batch_size, settings.otel_bsp_max_queue_size
            ),
        )
        # The SDK's own handler at exit waits for 30 s.
        provider = TracerProvider(
            sampler, _resource(settings), shutdown_on_exit=False, id_generator=self.ids
        )
        provider.add_span_processor(self.processor)
        # For spans that a feature makes by OpenTelemetry's API. `opentelemetry-instrument` has set
        # its own already, which exports to the same endpoint.
        if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
            trace.set_tracer_provider(provider)
        self.tracer = provider.get_tracer("app")

    async def close(self) -> None:
        """Send the last spans; leave them if that takes longer than `FLUSH_SECONDS`.

        In a daemon thread, which does not delay the exit: the SDK would wait for 30 s.
        """
        flush = threading.Thread(target=self.processor.shutdown, daemon=True)
        flush.start()
        end = time.monotonic() + FLUSH_SECONDS
        while flush.is_alive() and time.monotonic() < end:  # noqa: ASYNC110 - of a thread
            await asyncio.sleep(POLL_SECONDS)
        if flush.is_alive():
            self.sender.report("timeout at shutdown")


class SpanSender(SpanExporter):
    """OpenTelemetry's exporter; counts the spans, and logs the start and the end of an outage."""

    def __init__(self, settings: Settings) -> None:
        self.session = _Session()
        self.exporter = OTLPSpanExporter(session=self.session, **_exporter_options(settings))
        self.state = StateLog(logger, "traces are lost", "traces are sent again")
        # An increase is only seen of a counter that exists.
        _SPANS.labels("")

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send a batch, within `OTEL_EXPORTER_OTLP_TIMEOUT`."""
        result = self.exporter.export(spans)
        is_sent = result is SpanExportResult.SUCCESS
        problem = "" if is_sent else self.session.problem or "rejected"
        _SPANS.labels(problem).inc(len(spans))
        if is_sent:
            self.state.succeeded()
        else:
            self.report(problem)
        return result

    def report(self, problem: str) -> None:
        """Log that spans are lost, unless that is known."""
        if not self.state.is_failing:
            self.state.failed(problem)

    def shutdown(self) -> None:
        """Close the connections."""
        self.exporter.shutdown()  # type: ignore[no-untyped-call]


class _Session(requests.Session):
    """The exporter's HTTP client; remembers why the last request failed, which it only logs."""

    problem = ""

    def request(self, *arguments: Any, **options: Any) -> requests.Response:
        try:
            response = super().request(*arguments, **options)
        except Exception as error:
            self.problem = type(error).__name__
            raise
        self.problem = "" if response.ok else str(response.status_code)
        return response


class _Ids(RandomIdGenerator, TraceIds):
    def generate_trace_id(self) -> int:
        trace_id = self.next_trace_id or super().generate_trace_id()
        self.next_trace_id = 0
        return trace_id


class _HashedResource(Resource):
    """A resource that computes its hash once.

    The exporter groups spans by it, and the SDK renders JSON for each hash: 3.5 us per span.
    """

    def __init__(self, resource: Resource) -> None:
        super().__init__(dict(resource.attributes), resource.schema_url)
        self.hash = super().__hash__()

    __eq__ = Resource.__eq__

    def __hash__(self) -> int:
        return self.hash


def sampler_of(settings: Settings) -> tuple[Sampler, Sampling]:
    """Return the SDK's sampler, and the same rule for `Tracing.start_request`."""
    name = settings.otel_traces_sampler.removeprefix("parentbased_")
    follows_parent = name != settings.otel_traces_sampler
    ratios = {"always_on": 1.0, "always_off": 0.0}
    root = TraceIdRatioBased(ratios.get(name, settings.otel_traces_sampler_arg))
    sampling = Sampling(follows_parent, root.bound)
    return (ParentBased(root) if follows_parent else root), sampling


def _resource(settings: Settings) -> Resource:
    """Return what all spans have. OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME win."""
    own = {
        "service.name": settings.service_name,
        "service.version": settings.service_version,
        "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",
        "deployment.environment.name": settings.environment,
    }
    merged = Resource.create(own).merge(OTELResourceDetector().detect())
    return _HashedResource(merged)


def _exporter_options(settings: Settings) -> dict[str, Any]:
    """Return the settings that the exporter does not find in the environment.

    That is the endpoint, our default timeout, and what is in files of `SECRETS_DIR`. Variables win:
    the exporter reads them itself, those for traces alone (`..._TRACES_HEADERS`) first.
    """
    base = settings.otel_exporter_otlp_endpoint or ""
    endpoint = settings.otel_exporter_otlp_traces_endpoint or f"{base.rstrip('/')}/v1/traces"
    headers = settings.otel_exporter_otlp_headers.get_secret_value()
    options = {
        "timeout": settings.otel_exporter_otlp_timeout,
        "headers": parse_env_headers(headers, liberal=True),
        "compression": Compression(settings.otel_exporter_otlp_compression),
        "certificate": settings.otel_exporter_otlp_certificate,
        "client_certificate": settings.otel_exporter_otlp_client_certificate,
        "client_key": settings.otel_exporter_otlp_client_key,
    }
    unset = {name: value for name, value in options.items() if value and not _is_variable(name)}
    for name in ("certificate", "client_certificate", "client_key"):
        if name in unset:
            unset[f"{name}_file"] = str(unset.pop(name))
    return {"endpoint": endpoint, **unset}


def _is_variable(name: str) -> bool:
    names = (f"OTEL_EXPORTER_OTLP_{part}{name.upper()}" for part in ("", "TRACES_"))
    return any(os.environ.get(each) for each in names)
