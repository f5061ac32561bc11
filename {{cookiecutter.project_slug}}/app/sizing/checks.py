"""Checks that settings agree with each other and with the pod's resources."""

import math
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit

from app.settings import Settings
from app.sizing.plan import (
    BASE_MEMORY_MB,
    EXITED_WORKERS,
    MIN_CONNECTIONS,
    MIN_REPLICA_CONNECTIONS,
    OTHER_CONNECTIONS,
    USABLE_MEMORY,
    metrics_bytes,
    pod_connections,
    replica_connections,
    workers_by_memory,
)
from app.sizing.resources import MEGABYTE, Resources

#: Maximum duration of a blocking step: a cold import on a throttled CPU, a large document.
BLOCKING_STEP_SECONDS = 30
#: Part of the graceful timeout that the lifespan shutdown needs.
CLOSING_MARGIN_SECONDS = 2
#: Time between gunicorn's own shutdown and the kubelet's SIGKILL.
GRACE_MARGIN_SECONDS = 10
#: Workers of all pods of one release, by default: ten pods of one, or five of two. A rollout runs
#: the pods of two releases, and the surge.
WORKERS_OF_A_RELEASE = 10
SURGE = 1
#: The bound of a slow request in deploy/observe/prometheus/rules/objectives.yaml.
OBJECTIVE_SECONDS = 0.5
#: The ports on which a collector accepts OTLP over gRPC, and over HTTP.
GRPC_PORT = 4317
HTTP_PORT = 4318


class Pod(NamedTuple):
    """A pod that is checked; up to `replicas` of them are one release."""

    settings: Settings
    resources: Resources
    workers: int
    replicas: int


def default_replicas(workers: int) -> int:
    """Return how many pods of this number of workers a release has, unless that is given."""
    return max(1, WORKERS_OF_A_RELEASE // workers)


Check = Callable[[Pod], str | None]
CHECKS: list[Check] = []


def check_settings(
    settings: Settings, resources: Resources, workers: int, replicas: int
) -> list[str]:
    """Return one sentence, with the remedy, for each conflict; none for the defaults."""
    pod = Pod(settings, resources, workers, replicas)
    problems = [check(pod) for check in CHECKS]
    return [problem for problem in problems if problem]


def check(function: Check) -> Check:
    """Add a check, which returns its problem or None."""
    CHECKS.append(function)
    return function


@check
def workers_fit_the_cpus(pod: Pod) -> str | None:
    """Limit the workers to the CPUs, rounded up."""
    cpus = pod.resources.cpus
    useful = max(1, math.ceil(cpus * pod.settings.workers_per_core))
    if pod.workers <= useful:
        return None
    return (
        f"{pod.workers} workers on {cpus:g} CPUs have no more throughput than {useful}: "
        f"set WEB_CONCURRENCY={useful}"
    )


@check
def workers_fit_the_memory(pod: Pod) -> str | None:
    """Limit the workers to the memory, with a reserve for peaks."""
    needed_mb = pod.workers * pod.settings.worker_memory_mb + BASE_MEMORY_MB
    limit_mb = pod.resources.megabytes
    if needed_mb <= limit_mb * USABLE_MEMORY:
        return None
    by_memory = workers_by_memory(pod.settings, pod.resources)
    fewer_workers = f", or set WEB_CONCURRENCY={by_memory}" if by_memory < pod.workers else ""
    return (
        f"{pod.workers} workers need {needed_mb} MB, more than {USABLE_MEMORY:.0%} of "
        f"{limit_mb} MB: raise the memory limit{fewer_workers}"
    )


@check
def metrics_fit_into_the_shared_memory(pod: Pod) -> str | None:
    """Keep the label sets that the workers may have in /dev/shm, where the metrics are."""
    settings = pod.settings
    available = pod.resources.shared_memory_bytes
    needed = metrics_bytes(settings, pod.workers)
    if available is None or settings.prometheus_multiproc_dir or needed <= available:
        return None
    fitting = settings.metrics_max_label_sets * available // needed
    return (
        f"METRICS_MAX_LABEL_SETS={settings.metrics_max_label_sets} for {pod.workers} workers and "
        f"{EXITED_WORKERS} that have exited need {math.ceil(needed / MEGABYTE)} MB of /dev/shm, "
        f"which has {available // MEGABYTE} MB, so metrics become incomplete: enlarge it, or set "
        f"METRICS_MAX_LABEL_SETS={fitting}"
    )


@check
def buckets_have_the_bound_of_the_objective(pod: Pod) -> str | None:
    """Count the slow requests: the objective of latency reads the bucket of this bound."""
    buckets = pod.settings.metrics_buckets
    if OBJECTIVE_SECONDS in buckets:
        return None
    shown = ",".join(f"{bound:g}" for bound in buckets)
    return (
        f"METRICS_BUCKETS={shown} has no {OBJECTIVE_SECONDS:g}, so the alerts on latency never "
        f"fire: add {OBJECTIVE_SECONDS:g}, or change the objective and its rules"
    )


@check
def worker_timeout_exceeds_a_blocking_step(pod: Pod) -> str | None:
    """Replace stuck workers, but not those that execute one blocking step."""
    timeout = pod.settings.worker_timeout_seconds
    if timeout >= BLOCKING_STEP_SECONDS:
        return None
    if timeout == 0:
        effect = "disables the timeout, so a stuck worker is never replaced"
    else:
        effect = "is shorter than a blocking step may be, so busy workers are killed"
    return f"WORKER_TIMEOUT_SECONDS={timeout} {effect}: set it to {BLOCKING_STEP_SECONDS}"


@check
def graceful_timeout_covers_the_shutdown(pod: Pod) -> str | None:
    """Leave the last request its time, after the drain and the retirement."""
    settings = pod.settings
    steps = settings.drain_seconds + settings.retire_seconds + settings.request_timeout_seconds
    needed = math.ceil(steps) + CLOSING_MARGIN_SECONDS
    if needed <= settings.graceful_timeout_seconds:
        return None
    return (
        f"DRAIN_SECONDS={settings.drain_seconds:g} + RETIRE_SECONDS={settings.retire_seconds:g} + "
        f"REQUEST_TIMEOUT_SECONDS={settings.request_timeout_seconds:g} + {CLOSING_MARGIN_SECONDS} "
        f"exceed GRACEFUL_TIMEOUT_SECONDS={settings.graceful_timeout_seconds}, "
        f"so the last requests are cut off: set it to {needed}"
    )


@check
def database_timeouts_fit_into_the_request_timeout(pod: Pod) -> str | None:
    """Respond 503 to an outage of Postgres, before the request times out."""
    settings = pod.settings
    longest = settings.database_acquire_timeout_seconds + settings.database_command_timeout_seconds
    names = "DATABASE_ACQUIRE_TIMEOUT_SECONDS + DATABASE_COMMAND_TIMEOUT_SECONDS"
    if settings.has_replica:
        # A read that fails there is repeated on the primary.
        longest *= 2
        names = f"2 x ({names})"
    if longest < settings.request_timeout_seconds:
        return None
    return (
        f"{names} = {longest:g} must "
        f"be less than REQUEST_TIMEOUT_SECONDS={settings.request_timeout_seconds:g}, "
        "or an outage causes a 504 and not a 503: lower them"
    )


@check
def termination_grace_exceeds_the_graceful_timeout(pod: Pod) -> str | None:
    """Finish before the kubelet's SIGKILL."""
    graceful_timeout = pod.settings.graceful_timeout_seconds
    needed = graceful_timeout + GRACE_MARGIN_SECONDS
    if needed <= pod.settings.termination_grace_seconds:
        return None
    return (
        f"GRACEFUL_TIMEOUT_SECONDS={graceful_timeout} + {GRACE_MARGIN_SECONDS} exceed the "
        f"termination grace period of {pod.settings.termination_grace_seconds} s, "
        f"so SIGKILL comes first: set TERMINATION_GRACE_SECONDS={needed}"
    )


@check
def workers_are_recycled(pod: Pod) -> str | None:
    """Limit the effect of a memory leak."""
    if pod.settings.max_requests > 0:
        return None
    return "MAX_REQUESTS=0 disables recycling, so memory leaks grow without limit: set it to 20000"


@check
def workers_are_recycled_one_by_one(pod: Pod) -> str | None:
    """Spread out the recycling of workers that started together."""
    if pod.settings.max_requests == 0 or pod.settings.max_requests_jitter > 0:
        return None
    return "MAX_REQUESTS_JITTER=0 recycles all workers at once: set it to a tenth of MAX_REQUESTS"


@check
def workers_have_enough_connections(pod: Pod) -> str | None:
    """Give each worker a connection for requests and one for the readiness probe."""
    connections = pod_connections(pod.settings, pod.workers)
    needed = MIN_CONNECTIONS * pod.workers
    if connections >= needed:
        return None
    max_workers = max(1, connections // MIN_CONNECTIONS)
    return (
        f"DATABASE_MAX_CONNECTIONS={connections} is less than two for each of {pod.workers} "
        f"workers, one for requests and one for the readiness probe: set it to {needed}, "
        f"or MAX_WORKERS={max_workers}"
    )


@check
def both_servers_have_enough_connections(pod: Pod) -> str | None:
    """Leave the primary its connections, and give the read replica two for each worker."""
    settings = pod.settings
    share = replica_connections(settings, pod.workers)
    least = MIN_REPLICA_CONNECTIONS * pod.workers
    most = pod_connections(settings, pod.workers) - MIN_CONNECTIONS * pod.workers
    if not settings.has_replica or least <= share <= most:
        return None
    budget = (MIN_CONNECTIONS + MIN_REPLICA_CONNECTIONS) * pod.workers
    remedy = f"set it to {least} to {most}" if least <= most else f"set that to {budget}, or more"
    return (
        f"DATABASE_REPLICA_MAX_CONNECTIONS={share} of DATABASE_MAX_CONNECTIONS="
        f"{pod_connections(settings, pod.workers)} must leave two for each of "
        f"{pod.workers} workers to the primary, and two to the replica: {remedy}"
    )


@check
def postgres_has_enough_connections(pod: Pod) -> str | None:
    """Limit the connections of all pods during a rollout to those of the server."""
    per_pod = pod_connections(pod.settings, pod.workers)
    available = pod.settings.postgres_max_connections
    pods = 2 * pod.replicas + SURGE
    connections = pods * per_pod + OTHER_CONNECTIONS
    if connections <= available:
        return None
    return (
        f"(2 x {pod.replicas} replicas + {SURGE}) x {per_pod} + {OTHER_CONNECTIONS} = "
        f"{connections} connections exceed POSTGRES_MAX_CONNECTIONS={available}: "
        "lower DATABASE_MAX_CONNECTIONS, or use PgBouncer"
    )


@check
def spans_are_sent_by_http(pod: Pod) -> str | None:
    """Send spans to the collector's port for HTTP: that for gRPC rejects each batch."""
    settings = pod.settings
    names = ("otel_exporter_otlp_traces_endpoint", "otel_exporter_otlp_endpoint")
    name = next((each for each in names if getattr(settings, each)), None)
    if name is None or not settings.has_traces:
        return None
    endpoint = getattr(settings, name)
    if urlsplit(endpoint).port != GRPC_PORT:
        return None
    return (
        f"{name.upper()}={endpoint} has the port of OTLP over gRPC, but spans are sent over HTTP, "
        f"so all of them are lost: set the port to {HTTP_PORT}"
    )


@check
def a_part_of_the_requests_is_traced(pod: Pod) -> str | None:
    """Limit the cost of traces in production: a request that is traced costs twice the CPU."""
    settings = pod.settings
    if settings.environment != "production" or not settings.has_traces:
        return None
    sampler = settings.otel_traces_sampler
    traces_all = sampler.endswith("always_on") or (
        sampler.endswith("traceidratio") and settings.otel_traces_sampler_arg == 1
    )
    if not traces_all:
        return None
    return (
        f"OTEL_TRACES_SAMPLER={sampler} traces each request, which costs up to twice the CPU: set "
        "it to parentbased_traceidratio, and OTEL_TRACES_SAMPLER_ARG to 0.1"
    )
