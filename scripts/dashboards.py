"""Writes Grafana's dashboards of the service: one line for a panel.

`python -m scripts.dashboards` writes them into the template. A project has the JSON only, and edits
it in Grafana. It is the classic model, schemaVersion 42, which Grafana reads from a file.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

DASHBOARDS = (
    Path(__file__).resolve().parent.parent
    / "{{cookiecutter.project_slug}}"
    / "deploy/observe/grafana/dashboards"
)
HTTP = "http_server_request_duration_seconds"
DELAY = "worker_event_loop_delay_seconds"
CALLS = "http_client_request_duration_seconds"
POD = 'namespace=~"$namespace",job=~"$job"'
INSTANCE = f'{POD},instance=~"$instance"'
USERS = f'{INSTANCE},http_route!~"/health/.*"'
FAILED = f'{USERS},http_response_status_code=~"5.."'
USED = f'{INSTANCE},db_client_connection_state="used"'
POSTGRES = f'{INSTANCE},db_client_connection_pool_name="postgres"'
LOST = f'{INSTANCE},error_type!=""'
OBJECTIVE = 'job=~"$job"'
CONSUMER = 'namespace=~"$namespace",job=~"$job-consumer"'
JOBS = 'namespace=~"$namespace",job=~"$job-jobs"'
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24

#: The colors of a value: of its beginning, then from each limit on.
GOOD_BELOW_1 = (("green", None), ("red", 1))
GOOD_FROM_1 = (("red", None), ("green", 1))

Query = tuple[str, str]
Steps = tuple[tuple[str, float | None], ...]


class Row(NamedTuple):
    """A row of panels."""

    title: str


class Panel(NamedTuple):
    """A panel: its title, its queries, each with a legend, and their unit."""

    title: str
    queries: tuple[Query, ...]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    height: int = 7
    about: str = ""
    is_stacked: bool = False
    #: Values at which a line is drawn.
    limits: tuple[float, ...] = ()
    maximum: float | None = None
    steps: Steps = (("green", None),)


def doubled(legend: str) -> str:
    """Return a legend as Grafana has it: the names of labels in two braces."""
    return legend.replace("{", "{" * 2).replace("}", "}" * 2)


def select(metric: str, labels: str = INSTANCE) -> str:
    """Return a selector."""
    return metric + "{" + labels + "}"


def total(metric: str, by: str = "", labels: str = INSTANCE) -> str:
    """Return the sum of a gauge."""
    return f"sum{f' by ({by})' if by else ''} ({select(metric, labels)})"


def rate(metric: str, by: str = "", labels: str = INSTANCE) -> str:
    """Return the sum of the rates of a counter."""
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({select(metric, labels)}[$__rate_interval]))"


def quantile(share: float, metric: str, by: str = "le", labels: str = INSTANCE) -> str:
    """Return a quantile of a histogram."""
    return f"histogram_quantile({share}, {rate(f'{metric}_bucket', by, labels)})"


def quantiles(metric: str, labels: str = INSTANCE) -> tuple[Query, ...]:
    """Return three quantiles of a histogram."""
    shares = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
    return tuple((name, quantile(share, metric, labels=labels)) for name, share in shares)


def stat(title: str, query: str, unit: str, steps: Steps, about: str = "") -> Panel:
    """Return a panel with one number."""
    return Panel(title, (("", query),), unit, "stat", 4, 4, about, steps=steps)


def states(title: str, legend: str, query: str, steps: Steps) -> Panel:
    """Return a panel with the states of things over time."""
    return Panel(title, ((legend, query),), kind="state-timeline", steps=steps)


def burn_rates(title: str, objective: str) -> Panel:
    """Return a panel with the burn rates of an objective."""
    windows = ("5m", "1h", "6h", "3d")
    queries = [(each, select(f"job:{objective}:burn_rate{each}", POD)) for each in windows]
    about = "1 uses up the budget in 30 days. 14.4 in one hour, or 6 in six, is a page."
    return Panel(title, tuple(queries), width=12, about=about, limits=(1, 6, 14.4))


ERRORS = f"({rate(f'{HTTP}_count', labels=FAILED)} or vector(0))"
REQUESTS = rate(f"{HTTP}_count", labels=USERS)
REJECTED = f'{INSTANCE},http_route="unmatched",http_response_status_code="503"'
CPU_SECONDS = rate("process_cpu_time_seconds_total", "instance")
WORKER_CPU = f"{CPU_SECONDS} / {total('worker_processes', 'instance')}"
BUDGET = (
    f"clamp_min(1 - sum(sum_over_time({select('job:http_errors:rate5m', POD)}[30d]))"
    f" / sum(sum_over_time({select('job:http_requests:rate5m', POD)}[30d]))"
    f" / (1 - max({select('job:availability:objective', OBJECTIVE)})), -1)"
)
#: While a worker is recycled, there is one more than planned.
MISSING = f"clamp_min({total('worker_processes_planned')} - {total('worker_processes')}, 0)"
NGINX_STATES = (
    'label_replace({__name__=~"nginx_connections_(active|reading|writing|waiting)"}, '
    '"state", "$1", "__name__", "nginx_connections_(.*)")'
)
SERVICE: tuple[Row | Panel, ...] = (
    Row("Now"),
    stat("Requests", REQUESTS, "reqps", (("green", None),)),
    stat(
        "Errors",
        f"{ERRORS} / {REQUESTS}",
        "percentunit",
        (("green", None), ("orange", 0.001), ("red", 0.01)),
        "Responses with 5xx, without probes.",
    ),
    stat(
        "Latency, p99",
        quantile(0.99, HTTP, labels=USERS),
        "s",
        (("green", None), ("orange", 0.5), ("red", 1)),
    ),
    stat(
        "Error budget left",
        BUDGET,
        "percentunit",
        (("red", None), ("orange", 0), ("green", 0.25)),
        "Of 30 days, or of what Prometheus has kept of them.",
    ),
    stat(
        "CPU of workers",
        f"avg({select('job:worker_cpu:utilization5m', POD)})",
        "percentunit",
        (("green", None), ("orange", 0.6), ("red", 0.8)),
        "1 is all that a worker can use. Over 0.8: add workers. Under 0.3: remove some.",
    ),
    stat("Missing workers", MISSING, "short", GOOD_BELOW_1),
    Row("Requests"),
    Panel(
        "Requests by status",
        (
            (
                "{http_response_status_code}",
                rate(f"{HTTP}_count", "http_response_status_code", USERS),
            ),
        ),
        "reqps",
        is_stacked=True,
    ),
    Panel(
        "Requests by route",
        (
            (
                "{http_request_method} {http_route}",
                f"topk(10, {rate(f'{HTTP}_count', 'http_request_method, http_route', USERS)})",
            ),
        ),
        "reqps",
    ),
    Panel(
        "Errors by route",
        (
            (
                "{http_response_status_code} {http_route}",
                rate(f"{HTTP}_count", "http_response_status_code, http_route", FAILED),
            ),
        ),
        "reqps",
    ),
    Panel("Latency", quantiles(HTTP, USERS), "s"),
    Panel(
        "Latency by route, p95",
        (("{http_route}", f"topk(10, {quantile(0.95, HTTP, 'le, http_route', USERS)})"),),
        "s",
    ),
    Panel(
        "Latency, distribution", (("{le}", rate(f"{HTTP}_bucket", "le", USERS)),), "s", "heatmap"
    ),
    Row("Objectives"),
    burn_rates("Availability, burn rate", "availability"),
    burn_rates("Latency, burn rate", "latency"),
    Row("Workers"),
    Panel(
        "CPU per worker", (("{instance}", WORKER_CPU),), "percentunit", limits=(0.3, 0.8), maximum=1
    ),
    Panel(
        "Event loop delay",
        quantiles(DELAY),
        "s",
        about="High with a busy CPU: add workers. High with an idle one: blocking code.",
    ),
    Panel(
        "Requests in flight",
        (
            ("{instance}", select("http_server_active_requests")),
            ("limit", f"min({select('http_server_active_requests_limit')})"),
        ),
    ),
    Panel(
        "Rejected requests", (("{instance}", rate(f"{HTTP}_count", "instance", REJECTED)),), "reqps"
    ),
    Panel(
        "Workers",
        (
            ("{instance}", select("worker_processes")),
            ("planned", f"max({select('worker_processes_planned')})"),
        ),
    ),
    Panel(
        "Exits of workers by reason",
        (
            (
                "{reason}",
                f"sum by (reason) (increase({select('worker_exits_total')}[$__rate_interval]))",
            ),
        ),
        about="recycled, stopped: as planned. timeout: blocked event loop. crashed: or killed.",
    ),
    Panel(
        "Memory of the pod",
        (
            ("{instance}", select("cgroup_memory_usage_bytes")),
            ("limit", f"min({select('cgroup_memory_limit_bytes')})"),
        ),
        "bytes",
    ),
    Panel(
        "Memory per worker",
        (("{instance} {pid}", select("worker_resident_memory_bytes")),),
        "bytes",
    ),
    Panel(
        "CPU throttling",
        (
            (
                "{instance}",
                f"rate({select('cgroup_cpu_throttled_seconds_total')}[$__rate_interval])",
            ),
        ),
        "percentunit",
        about="Share of the time in which the CPU limit stopped the pod.",
    ),
    Row("Dependencies and losses"),
    states("Dependencies up", "{dependency} {instance}", select("dependency_up"), GOOD_FROM_1),
    Panel(
        "Connections in use",
        (
            (
                "{db_client_connection_pool_name} {instance}",
                select("db_client_connection_count", USED),
            ),
            ("maximum, Postgres", f"max({select('db_client_connection_max', POSTGRES)})"),
        ),
    ),
    Panel(
        "Waiting for a connection",
        (
            ("waiting", total("db_client_connection_pending_requests")),
            ("timeouts per second", rate("db_client_connection_timeouts_total")),
        ),
    ),
    Panel(
        "Unhandled exceptions",
        (("exceptions", rate("http_server_unhandled_exceptions_total")),),
        "ops",
        width=12,
    ),
    Panel(
        "Dropped log lines and traces",
        (
            ("access lines", rate("access_log_dropped_lines_total")),
            ("other lines", rate("log_dropped_lines_total")),
            (
                "spans: {error_type}",
                rate("otel_sdk_exporter_span_exported_total", "error_type", LOST),
            ),
        ),
        "ops",
        width=12,
    ),
    Row("nginx"),
    Panel("Connections by state", (("{state}", NGINX_STATES),)),
    Panel(
        "Requests at nginx",
        (("requests", "sum(rate(nginx_http_requests_total[$__rate_interval]))"),),
        "reqps",
    ),
    Panel(
        "Dropped connections",
        (
            (
                "dropped",
                "sum(rate(nginx_connections_accepted[$__rate_interval]))"
                " - sum(rate(nginx_connections_handled[$__rate_interval]))",
            ),
        ),
        "cps",
        about="Accepted, but not handled: worker_connections is too small.",
    ),
)
PAYMENTS: tuple[Row | Panel, ...] = (
    Row("Events"),
    Panel(
        "Outbox",
        (
            ("events", f"max({select('outbox_backlog_events', POD)})"),
            ("lag, seconds", f"max({select('outbox_lag_seconds', POD)})"),
        ),
    ),
    Panel(
        "Stream",
        (
            ("{state}", f"max by (state) ({select('stream_messages_waiting', CONSUMER)})"),
            ("lag, seconds", f"max({select('stream_lag_seconds', CONSUMER)})"),
        ),
    ),
    Panel(
        "Events by outcome",
        (("{outcome}", rate("stream_messages_handled_total", "outcome", CONSUMER)),),
        "ops",
        is_stacked=True,
    ),
    Row("Gateway"),
    Panel(
        "Calls by outcome",
        (("{outcome}", rate(f"{CALLS}_count", "outcome", CONSUMER)),),
        "ops",
        is_stacked=True,
    ),
    Panel("Latency of calls", quantiles(CALLS, CONSUMER), "s"),
    states(
        "Circuit breaker open",
        "{upstream}",
        f"max by (upstream) ({select('circuit_breaker_open', CONSUMER)})",
        GOOD_BELOW_1,
    ),
    Row("Redis"),
    Panel(
        "Cache reads by result",
        (("{result}", rate("cache_reads_total", "result", POD)),),
        "ops",
        width=12,
        is_stacked=True,
    ),
    Panel(
        "Rate limit",
        (
            ("rejected: {limit}", rate("rate_limit_refused_requests_total", "limit", POD)),
            ("unchecked: {limit}", rate("rate_limit_unchecked_requests_total", "limit", POD)),
        ),
        "reqps",
        width=12,
    ),
)
JOB_PANELS: tuple[Row | Panel, ...] = (
    Row("Jobs"),
    Panel("Jobs by status", (("{status}", f"max by (status) ({select('jobs', JOBS)})"),)),
    Panel(
        "Oldest job due",
        (("oldest", f"max({select('jobs_oldest_seconds', JOBS)})"),),
        "s",
        limits=(300,),
    ),
    Panel(
        "Starts by outcome",
        (("{outcome}", rate("jobs_handled_total", "outcome", JOBS)),),
        "ops",
        is_stacked=True,
    ),
    Panel(
        "Starts by type",
        (("{type}", rate("jobs_handled_total", "type", JOBS)),),
        "ops",
        is_stacked=True,
    ),
    Panel("Wait for a start", quantiles("job_wait_seconds", JOBS), "s"),
    Panel("Duration of a start", quantiles("job_duration_seconds", JOBS), "s"),
    Row("Workers of jobs"),
    Panel("Jobs running", (("{instance}", select("jobs_under_way", JOBS)),)),
    Panel(
        "CPU of workers of jobs",
        (("used", select("job:jobs_cpu:utilization5m", JOBS)),),
        "percentunit",
        limits=(0.3, 0.9),
        maximum=1,
    ),
    Panel("Event loop delay", quantiles(DELAY, JOBS), "s"),
)

_LEGEND = {"displayMode": "list", "placement": "bottom", "showLegend": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {"legend": _LEGEND, "tooltip": {"mode": "multi", "sort": "desc"}},
    "stat": {
        "colorMode": "value",
        "graphMode": "area",
        "justifyMode": "auto",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "textMode": "auto",
    },
    "heatmap": {
        "calculate": False,
        "color": {
            "mode": "scheme",
            "scheme": "Spectral",
            "reverse": True,
            "steps": 64,
            "exponent": 0.5,
            "fill": "dark-orange",
        },
        "yAxis": {"unit": "s"},
        "cellGap": 1,
        "legend": {"show": True},
        "tooltip": {"mode": "single"},
        "filterValues": {"le": 1e-09},
    },
    "state-timeline": {
        "legend": _LEGEND,
        "showValue": "never",
        "mergeValues": True,
        "rowHeight": 0.9,
    },
}


def panel_json(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    """Return a panel in Grafana's model."""
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "targets": [
            target_json(panel, index, legend, query)
            for index, (legend, query) in enumerate(panel.queries)
        ],
        "fieldConfig": {"defaults": defaults_json(panel), "overrides": []},
        "options": OPTIONS[panel.kind],
    }


def target_json(panel: Panel, index: int, legend: str, query: str) -> dict[str, Any]:
    """Return a query."""
    return {
        "refId": chr(ord("A") + index),
        "datasource": SOURCE,
        "expr": query,
        "legendFormat": doubled(legend) or "__auto",
        "range": True,
        "format": "heatmap" if panel.kind == "heatmap" else "time_series",
    }


def defaults_json(panel: Panel) -> dict[str, Any]:
    """Return how values are drawn."""
    is_by_value = panel.kind in {"stat", "state-timeline"}
    steps = [{"color": color, "value": value} for color, value in panel.steps]
    custom: dict[str, Any] = {}
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "color": {"mode": "thresholds" if is_by_value else "palette-classic"},
        "custom": custom,
    }
    if panel.kind == "timeseries":
        defaults["min"] = 0
        custom |= {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 25 if panel.is_stacked else 8,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if panel.is_stacked else "none", "group": "A"},
        }
    if panel.limits:
        steps = [{"color": "transparent", "value": None}]
        steps += [{"color": "orange", "value": limit} for limit in panel.limits]
        custom["thresholdsStyle"] = {"mode": "dashed"}
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    return defaults | {"thresholds": {"mode": "absolute", "steps": steps}}


def row_json(row: Row, number: int, y: int) -> dict[str, Any]:
    """Return the title of a row."""
    place = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
    return {
        "id": number,
        "type": "row",
        "title": row.title,
        "collapsed": False,
        "gridPos": place,
        "panels": [],
    }


def panels_json(panels: tuple[Row | Panel, ...]) -> list[dict[str, Any]]:
    """Return panels with their places: from left to right, then the next line."""
    found: list[dict[str, Any]] = []
    x = 0
    y = 0
    height = 0
    for number, each in enumerate(panels, 1):
        if isinstance(each, Row):
            y += height
            found.append(row_json(each, number, y))
            x = 0
            y += 1
            height = 0
            continue
        if x + each.width > COLUMNS:
            x = 0
            y += height
        found.append(panel_json(each, number, x, y))
        x += each.width
        height = each.height
    return found


def variable(name: str, query: str, label: str, *, is_many: bool) -> dict[str, Any]:
    """Return a variable of a dashboard, whose values are those of a label."""
    found = {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": SOURCE,
        "query": {"qryType": 1, "query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": is_many,
        "includeAll": is_many,
        "options": [],
    }
    everything = {"allValue": ".*", "current": {"text": "All", "value": "$__all"}}
    return found | (everything if is_many else {})


def annotation(name: str, color: str, query: str, **fields: str) -> dict[str, Any]:
    """Return marks in all panels."""
    common = {"name": name, "enable": True, "iconColor": color, "datasource": SOURCE}
    return common | {"expr": query} | fields


def dashboard(name: str, title: str, panels: tuple[Row | Panel, ...]) -> dict[str, Any]:
    """Return a dashboard."""
    workers = "worker_processes"
    space = 'namespace=~"$namespace"'
    versions = f"count by (service_version) ({select('target_info', POD)})"
    earlier = f"count by (service_version) ({select('target_info', POD)} offset 5m)"
    source = {
        "type": "datasource",
        "name": "datasource",
        "label": "source",
        "query": "prometheus",
        "options": [],
        "regex": "",
        "refresh": 1,
    }
    firing = 'ALERTS{alertstate="firing",job=~"$job(-.*)?"}'
    return {
        "uid": f"fastapi-{name}",
        "title": title,
        "tags": ["fastapi-production-template"],
        "schemaVersion": 42,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "fiscalYearStartMonth": 0,
        "links": [],
        "panels": panels_json(panels),
        "annotations": {
            "list": [
                annotation(
                    "versions",
                    "blue",
                    f"{versions} unless {earlier}",
                    titleFormat=doubled("{service_version}"),
                ),
                annotation("alerts", "red", firing, titleFormat=doubled("{alertname}")),
            ]
        },
        "templating": {
            "list": [
                source,
                variable(
                    "namespace",
                    f"label_values({select(workers, '')}, namespace)",
                    "namespace",
                    is_many=True,
                ),
                variable(
                    "job", f"label_values({select(workers, space)}, job)", "service", is_many=False
                ),
                variable(
                    "instance",
                    f"label_values({select(workers, POD)}, instance)",
                    "instance",
                    is_many=True,
                ),
            ]
        },
    }


CONTENTS = {
    "service": dashboard("service", "FastAPI service", SERVICE),
    "payments": dashboard("payments", "Payments example", PAYMENTS),
    "jobs": dashboard("jobs", "Jobs", JOB_PANELS),
}


def text(name: str) -> str:
    """Return a dashboard as its file has it."""
    return json.dumps(CONTENTS[name], indent=1) + "\n"


def main() -> None:
    """Write the dashboards."""
    for name in CONTENTS:
        (DASHBOARDS / f"{name}.json").write_text(text(name))


if __name__ == "__main__":
    main()
