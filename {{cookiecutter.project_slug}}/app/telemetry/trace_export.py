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
from opentelemetry.exporter.otlp.proto.http import Compression, trace_exporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import (
    ReadableSpan,
    SpanLimits,
    SpanProcessor,
    SynchronousMultiSpanProcessor,
    TracerProvider,
)
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanKind, Status
from opentelemetry.util.re import parse_env_headers
from prometheus_client import Counter

from app.settings import Settings
from app.tasks import StateLog
from app.telemetry import span_encoding
from app.telemetry.tracing import RequestSpan, Sampling, SpanIds

#: Time limit for the last spans. It is a part of `server.CLOSING_SECONDS`.
FLUSH_SECONDS = 1.0
POLL_SECONDS = 0.02
#: The part of the service that makes our spans.
SCOPE = InstrumentationScope("app", "")
#: The attributes of the span of a request, at most.
REQUEST_ATTRIBUTES = 7
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
        self.processor = _batch_processor(self.sender, settings)
        self.processors = _Processors()  # type: ignore[no-untyped-call]
        # The SDK's own handler at exit waits for 30 s.
        provider = TracerProvider(
            sampler,
            _resource(settings),
            shutdown_on_exit=False,
            active_span_processor=self.processors,
            id_generator=self.ids,
        )
        provider.add_span_processor(self.processor)
        self.provider = provider
        # For spans that a feature makes by OpenTelemetry's API. `opentelemetry-instrument` has set
        # its own already, which exports to the same endpoint.
        if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
            trace.set_tracer_provider(provider)
        self.tracer = provider.get_tracer(SCOPE.name)
        self.has_limits = _limits_requests(SpanLimits())

    @property
    def needs_sdk_spans(self) -> bool:
        """Whether a feature looks at each span, or the environment limits their attributes."""
        return self.has_limits or self.processors.number > 1

    def send_request(
        self, span: RequestSpan, name: str, attributes: dict[str, Any], status: Status
    ) -> None:
        """Send the span of a request that ends now."""
        readable = _RequestSpan(
            name,
            span.get_span_context(),
            span.parent,
            self.provider.resource,
            attributes,
            kind=SpanKind.SERVER,
            status=status,
            start_time=span.start_ns,
            end_time=time.time_ns(),
            instrumentation_scope=SCOPE,
        )
        self.processor.on_end(readable)

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


class _RequestSpan(ReadableSpan):
    """A span without events and links, of which nothing was dropped.

    `ReadableSpan` looks at the types of its lists for that, which costs as much as to encode it.
    """

    events = ()
    links = ()
    dropped_attributes = 0
    dropped_events = 0
    dropped_links = 0


class SpanSender(SpanExporter):
    """OpenTelemetry's exporter; counts the spans, and logs the start and the end of an outage."""

    def __init__(self, settings: Settings) -> None:
        # The exporter has no parameter for it.
        trace_exporter.encode_spans = span_encoding.encode  # type: ignore[attr-defined,assignment]
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


class _Ids(RandomIdGenerator, SpanIds):
    def generate_trace_id(self) -> int:
        trace_id = self.next_trace_id or super().generate_trace_id()
        self.next_trace_id = 0
        return trace_id

    def generate_span_id(self) -> int:
        span_id = self.next_span_id or super().generate_span_id()
        self.next_span_id = 0
        return span_id


class _Processors(SynchronousMultiSpanProcessor):
    """Counts the processors: ours, and those that a feature adds."""

    number = 0

    def add_span_processor(self, span_processor: SpanProcessor) -> None:
        super().add_span_processor(span_processor)
        self.number += 1


def sampler_of(settings: Settings) -> tuple[Sampler, Sampling]:
    """Return the SDK's sampler, and the same rule for `Tracing.start_request`."""
    name = settings.otel_traces_sampler.removeprefix("parentbased_")
    follows_parent = name != settings.otel_traces_sampler
    ratios = {"always_on": 1.0, "always_off": 0.0}
    root = TraceIdRatioBased(ratios.get(name, settings.otel_traces_sampler_arg))
    sampling = Sampling(follows_parent, root.bound)
    return (ParentBased(root) if follows_parent else root), sampling


def _batch_processor(sender: SpanSender, settings: Settings) -> BatchSpanProcessor:
    maximum = settings.otel_bsp_max_queue_size
    return BatchSpanProcessor(
        sender,
        max_queue_size=maximum,
        schedule_delay_millis=settings.otel_bsp_schedule_delay,
        max_export_batch_size=min(settings.otel_bsp_max_export_batch_size, maximum),
    )


def _limits_requests(limits: SpanLimits) -> bool:
    """Return whether variables such as OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT concern our attributes."""
    number = limits.max_span_attributes
    is_small = number is not None and number < REQUEST_ATTRIBUTES
    return is_small or limits.max_span_attribute_length is not None


def _resource(settings: Settings) -> Resource:
    """Return what all spans have. OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME win."""
    own = {
        "service.name": settings.service_name,
        "service.version": settings.service_version,
        "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",
        "deployment.environment.name": settings.environment,
    }
    return Resource.create(own).merge(OTELResourceDetector().detect())


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
