"""Which settings do not agree with each other, or with the CPUs and the memory."""

import math

from app.settings import Settings
from app.sizing.plan import BASE_MEMORY_MB, USABLE_MEMORY, workers_by_memory
from app.sizing.resources import Resources

BLOCKING_STEP_SECONDS = (
    30  # how long one may last: a cold import on a throttled CPU, a large document
)
CLOSING_MARGIN_SECONDS = 2  # of the graceful timeout, for lifespan shutdown
GRACE_MARGIN_SECONDS = 10  # between gunicorn's own end and the kubelet's SIGKILL
REPLICAS, SURGE = 10, 1  # most pods of one release; a rollout runs two sets and the surge
OTHER_CONNECTIONS = 4  # three that Postgres reserves for its superuser, one for the migration


def check_settings(s: Settings, machine: Resources, workers: int, replicas: int) -> list[str]:
    """Return one sentence for each incoherence of these settings, with its remedy; none for the defaults."""
    by_cpu = max(1, math.ceil(machine.cpus * s.workers_per_core))
    memory, carried = workers * s.worker_memory_mb + BASE_MEMORY_MB, workers_by_memory(s, machine)
    grace = s.graceful_timeout_seconds + GRACE_MARGIN_SECONDS
    graceful = (
        math.ceil(s.drain_seconds + s.retire_seconds + s.request_timeout_seconds)
        + CLOSING_MARGIN_SECONDS
    )
    answer = s.database_acquire_timeout_seconds + s.database_command_timeout_seconds
    budget = s.database_max_connections
    connections = (2 * replicas + SURGE) * budget + OTHER_CONNECTIONS
    rules = [
        (
            workers > by_cpu,
            f"{workers} workers on {machine.cpus:g} CPUs only take turns: set WEB_CONCURRENCY={by_cpu}",
        ),
        (
            memory > machine.megabytes * USABLE_MEMORY,
            f"{workers} workers need {memory} MB, more than {USABLE_MEMORY:.0%} of {machine.megabytes} MB: raise the "
            f"memory limit{f', or set WEB_CONCURRENCY={carried}' if carried < workers else ''}",
        ),
        (
            s.worker_timeout_seconds < BLOCKING_STEP_SECONDS,
            f"WORKER_TIMEOUT_SECONDS={s.worker_timeout_seconds} is off, or shorter than one blocking step may last: "
            f"set it to {BLOCKING_STEP_SECONDS}",
        ),
        (
            graceful > s.graceful_timeout_seconds,
            f"DRAIN_SECONDS={s.drain_seconds:g} + RETIRE_SECONDS={s.retire_seconds:g} + REQUEST_TIMEOUT_SECONDS="
            f"{s.request_timeout_seconds:g} + {CLOSING_MARGIN_SECONDS} are over GRACEFUL_TIMEOUT_SECONDS="
            f"{s.graceful_timeout_seconds}, so the last requests are cut off: set it to {graceful}",
        ),
        (
            answer >= s.request_timeout_seconds,
            f"DATABASE_ACQUIRE_TIMEOUT_SECONDS + DATABASE_COMMAND_TIMEOUT_SECONDS = {answer:g} do not fit into "
            f"REQUEST_TIMEOUT_SECONDS={s.request_timeout_seconds:g}, so an outage is 504 and not 503: lower them",
        ),
        (
            grace > s.termination_grace_seconds,
            f"GRACEFUL_TIMEOUT_SECONDS={s.graceful_timeout_seconds} + {GRACE_MARGIN_SECONDS} is over the termination "
            f"grace of {s.termination_grace_seconds} s, so SIGKILL comes first: set TERMINATION_GRACE_SECONDS={grace}",
        ),
        (
            s.max_requests == 0,
            "MAX_REQUESTS=0 switches recycling off, so leaks grow for ever: set it to 20000",
        ),
        (
            s.max_requests > 0 and s.max_requests_jitter == 0,
            "MAX_REQUESTS_JITTER=0 recycles all workers at once: set it to a tenth of MAX_REQUESTS",
        ),
        (
            budget < 2 * workers,
            f"DATABASE_MAX_CONNECTIONS={budget} is under two for each of {workers} workers, one to serve and one for "
            f"readiness: set it to {2 * workers}, or MAX_WORKERS={max(1, budget // 2)}",
        ),
        (
            connections > s.postgres_max_connections,
            f"(2 x {replicas} replicas + {SURGE}) x {budget} + {OTHER_CONNECTIONS} = {connections} connections exceed "
            f"POSTGRES_MAX_CONNECTIONS={s.postgres_max_connections}: lower DATABASE_MAX_CONNECTIONS, or use PgBouncer",
        ),
    ]
    return [text for broken, text in rules if broken]
