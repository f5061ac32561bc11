"""Metrics of a whole pod: of its configuration, and of its workers' lives.

The master sets them, in the API; in a consumer, its only process.
"""

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from app.settings import Settings

#: Why a worker has exited.
EXIT_REASONS = ("recycled", "stopped", "timeout", "crashed")


def set_pod_metrics(settings: Settings, registry: CollectorRegistry = REGISTRY) -> None:
    """Set the gauges that do not change while the process runs.

    `target_info` has the resource attributes of OpenTelemetry: the versions that are running.
    """

    def gauge(name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=registry, multiprocess_mode="livemax")

    text = "Attributes of the service, in its labels; always 1."
    names = ("service_name", "service_version", "deployment_environment_name")
    values = (settings.service_name, settings.service_version, settings.environment)
    gauge("target_info", text, *names).labels(*values).set(1)
    text = "Maximum number of connections of the Postgres server."
    gauge("db_server_connections_limit", text).set(settings.postgres_max_connections)


class MasterMetrics:
    """The metrics of gunicorn's master."""

    def __init__(self, settings: Settings) -> None:
        registry = CollectorRegistry()
        set_pod_metrics(settings, registry)
        text = "Workers that the pod is configured to have."
        self.planned = Gauge(
            "worker_processes_planned", text, registry=registry, multiprocess_mode="livemax"
        )
        text = f"Exits of workers, by reason: {', '.join(EXIT_REASONS)}."
        self.exits = Counter("worker_exits", text, ["reason"], registry=registry)
        # A counter that began with its first event would have no increase.
        for reason in EXIT_REASONS:
            self.exits.labels(reason)
