"""The numbers that the page shows, from two scrapes."""

import math
from collections import defaultdict
from typing import Any

from scripts.watch.exposition import Labels, Metrics

REQUESTS = "http_server_request_duration_seconds"
POOL = "db_client_connection_pool_name"
#: Work that waits: a metric, and the label that names it on the page.
WAITING = (
    ("outbox_backlog_events", "outbox", "table"),
    ("stream_messages_waiting", "stream", "state"),
    ("jobs", "jobs", "status"),
)
#: The age of the oldest of it.
AGES = (
    ("outbox_lag_seconds", "outbox"),
    ("stream_lag_seconds", "stream"),
    ("jobs_oldest_seconds", "jobs"),
)

Sample = dict[str, Any]


def sample(now: Metrics, before: Metrics, seconds: float) -> Sample:
    """Return the state of `now`, and the rates since `before`, `seconds` ago."""
    return {
        **_requests(now, before, seconds),
        "in_flight": now.total("http_server_active_requests"),
        "in_flight_limit": now.total("http_server_active_requests_limit"),
        "workers": now.total("worker_processes"),
        "planned": now.total("worker_processes_planned"),
        "memory": {
            labels["pid"]: round(value / 1e6, 1)
            for labels, value in now.items("worker_resident_memory_bytes")
        },
        "exits": {labels["reason"]: value for labels, value in now.items("worker_exits_total")},
        "cpu": _rate(now, before, "process_cpu_time_seconds_total", seconds),
        "pools": _pools(now),
        "timeouts": now.total("db_client_connection_timeouts_total"),
        "dependencies": {
            labels["dependency"]: value for labels, value in now.items("dependency_up")
        },
        "waiting": _waiting(now),
        "ages": {name: now.total(metric) for metric, name in AGES if now.items(metric)},
        "service": [labels.get("service_name") for labels, _ in now.items("target_info")],
    }


def _requests(now: Metrics, before: Metrics, seconds: float) -> Sample:
    """Return rates and quantiles of the requests other than probes."""
    earlier = {_key(labels): value for labels, value in before.items(f"{REQUESTS}_count")}
    rates: dict[str, float] = defaultdict(float)
    for labels, value in now.items(f"{REQUESTS}_count"):
        if _is_of_users(labels):
            status = labels["http_response_status_code"][0]
            rates[status] += max(value - earlier.get(_key(labels), 0), 0) / seconds
    buckets = _buckets(now, before)
    return {
        "rate": round(sum(rates.values()), 2),
        "errors": round(rates["5"], 2),
        "rejected": round(rates["4"], 2),
        "p50": quantile(buckets, 0.5),
        "p99": quantile(buckets, 0.99),
    }


def _is_of_users(labels: Labels) -> bool:
    return "/health/" not in labels.get("http_route", "")


def _key(labels: Labels) -> tuple[str, ...]:
    return tuple(sorted(labels.values()))


def _buckets(now: Metrics, before: Metrics) -> dict[float, float]:
    """Return the requests since `before` by upper bound of their duration, cumulative."""
    earlier = {_key(labels): value for labels, value in before.items(f"{REQUESTS}_bucket")}
    buckets: dict[float, float] = defaultdict(float)
    for labels, value in now.items(f"{REQUESTS}_bucket"):
        if _is_of_users(labels):
            buckets[float(labels["le"])] += max(value - earlier.get(_key(labels), 0), 0)
    return buckets


def quantile(buckets: dict[float, float], share: float) -> float | None:
    """Return a quantile in seconds, interpolated as PromQL's histogram_quantile does."""
    bounds = sorted(buckets)
    if not bounds or not buckets[bounds[-1]]:
        return None
    rank = share * buckets[bounds[-1]]
    lower, below = 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= rank:
            break
        lower, below = bound, buckets[bound]
    if math.isinf(bound):
        return lower
    inside = buckets[bound] - below
    return round(lower + (bound - lower) * ((rank - below) / inside if inside else 1), 5)


def _rate(now: Metrics, before: Metrics, name: str, seconds: float) -> float | None:
    value = now.total(name)
    if value is None:
        return None
    return round(max(value - (before.total(name) or 0), 0) / seconds, 3)


def _pools(now: Metrics) -> Sample:
    pools = {}
    for labels, maximum in now.items("db_client_connection_max"):
        name = labels[POOL]
        pool = {POOL: name}
        state = {"db_client_connection_state": "used"}
        pools[name] = {
            "used": now.total("db_client_connection_count", **pool, **state) or 0,
            "open": now.total("db_client_connection_count", **pool) or 0,
            "max": maximum,
            "waiting": now.total("db_client_connection_pending_requests", **pool) or 0,
        }
    return pools


def _waiting(now: Metrics) -> dict[str, float | None]:
    return {
        _title(name, labels.get(label, "")): None if math.isnan(value) else value
        for metric, name, label in WAITING
        for labels, value in now.items(metric)
    }


def _title(name: str, part: str) -> str:
    return name if part in {"", name} else f"{name} {part}"
