"""Writes the rules of the two objectives, and their tests: the same lines for each window.

`python -m scripts.objectives` writes them into the template. A project has the files only: a team
edits the numbers there.

The pairs of windows are those of Google's workbook, "Alerting on SLOs": a long window that shows
that it matters, and a short one that ends the alert soon after its cause.
"""

from pathlib import Path
from string import Template
from typing import NamedTuple

PROMETHEUS = (
    Path(__file__).resolve().parent.parent
    / "{{cookiecutter.project_slug}}"
    / "deploy/observe/prometheus"
)
JOB = "{" + "{ cookiecutter.project_slug }" + "}"
WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")


class Objective(NamedTuple):
    """An objective: its name in recorded series, its alert, and the requests that miss it."""

    name: str
    alert: str
    bad: str
    summary: str


class Pair(NamedTuple):
    """Two windows whose burn rates both have to be high."""

    long: str
    short: str
    factor: str
    budget: str
    severity: str
    wait_minutes: int


OBJECTIVES = (
    Objective("availability", "ErrorBudgetBurn", "job:http_errors:rate5m", "requests fail"),
    Objective("latency", "LatencyBudgetBurn", "job:http_slow:rate5m", "requests are slow"),
)
PAIRS = (
    Pair("1h", "5m", "14.4", "2 %", "page", 2),
    Pair("6h", "30m", "6", "5 %", "page", 6),
    Pair("1d", "2h", "3", "10 %", "ticket", 30),
    Pair("3d", "6h", "1", "10 %", "ticket", 60),
)

HEADER = """\
# The two objectives, over 30 days, and how fast their error budgets burn.
# severity: page = now, at night too; ticket = in working hours; info = advice on capacity.
groups:
  - name: "$job.objectives"
    interval: 30s
    rules:
      # These two numbers, and `le` below, are yours to change: nothing else repeats them.
      - record: job:availability:objective
        expr: vector(0.999)
        labels:
          job: "$job"
      - record: job:latency:objective
        expr: vector(0.99)
        labels:
          job: "$job"
      # Without probes. A client that disconnected (499) has seen no error, but may have left because it was slow.
      - record: job:http_requests:rate5m
        expr: sum by (namespace, job) (rate(http_server_request_duration_seconds_count{job="$job",http_route!~"/health/.*"}[5m]))
      - record: job:http_errors:rate5m
        expr: |
          sum by (namespace, job) (rate(http_server_request_duration_seconds_count{job="$job",http_route!~"/health/.*",http_response_status_code=~"5.."}[5m]))
            or 0 * job:http_requests:rate5m{job="$job"}
      # The duration of a stream ends with its start here, so that streams are not slow.
      - record: job:http_slow:rate5m
        expr: |
          sum by (namespace, job) (rate(http_server_request_duration_seconds_bucket{job="$job",http_route!~"/health/.*",http_response_status_code!~"5..",le="+Inf"}[5m]))
            - sum by (namespace, job) (rate(http_server_request_duration_seconds_bucket{job="$job",http_route!~"/health/.*",http_response_status_code!~"5..",le="0.5"}[5m]))
      # 1 uses the budget up in exactly 30 days. Long windows are averages of the rates above: a day is 2,880 samples.
      # There is no burn rate without requests: 0/0 is NaN, and one NaN spoils every average that contains it.
"""
BURN_RATE = """\
      - record: job:$name:burn_rate$window
        expr: |
          ($bad / ($all > 0))
            / on (job) group_left () (1 - job:$name:objective{job="$job"})
"""
ALERT = """\
      - alert: $alert
        # Fewer than 11 bad requests page nobody. The factor 30 is the interval of this group, in seconds.
        expr: |
          job:$name:burn_rate$long{job="$job"} > $factor
            and job:$name:burn_rate$short{job="$job"} > $factor
            and sum_over_time($bad{job="$job"}[$long]) * 30 > 10
        for: ${wait_minutes}m
        labels:
          severity: $severity
          window: $long
        annotations:
          summary: $summary $factor times as often as the objective allows, which costs $budget of its budget in $long
          runbook: docs/alerts.md#$anchor
"""
TESTS = """\
# `make rules` runs these tests. Burn rates are given here; service.yaml has them from requests.
rule_files: [../rules/objectives.yaml]
evaluation_interval: 30s

tests:
"""
TEST = """\
  - name: "$alert: $long and $short, each above and below $factor; few requests"
    interval: 30s
    input_series:
      - {series: 'job:$name:burn_rate$long{job="$job",namespace="burns"}', values: ${above}x$steps}
      - {series: 'job:$name:burn_rate$short{job="$job",namespace="burns"}', values: ${above}x$steps}
      - {series: '$bad{job="$job",namespace="burns"}', values: ${many} 0x$steps}
      - {series: 'job:$name:burn_rate$long{job="$job",namespace="begins"}', values: ${below}x$steps}
      - {series: 'job:$name:burn_rate$short{job="$job",namespace="begins"}', values: ${above}x$steps}
      - {series: '$bad{job="$job",namespace="begins"}', values: ${many} 0x$steps}
      - {series: 'job:$name:burn_rate$long{job="$job",namespace="ended"}', values: ${above}x$steps}
      - {series: 'job:$name:burn_rate$short{job="$job",namespace="ended"}', values: ${below}x$steps}
      - {series: '$bad{job="$job",namespace="ended"}', values: ${many} 0x$steps}
      - {series: 'job:$name:burn_rate$long{job="$job",namespace="few"}', values: ${above}x$steps}
      - {series: 'job:$name:burn_rate$short{job="$job",namespace="few"}', values: ${above}x$steps}
      - {series: '$bad{job="$job",namespace="few"}', values: ${few} 0x$steps}
    promql_expr_test:
      - expr: count by (namespace) (ALERTS{alertname="$alert",alertstate="firing",window="$long"})
        eval_time: ${early}s
        exp_samples: []
      - expr: count by (namespace, severity) (ALERTS{alertname="$alert",alertstate="firing",window="$long"})
        eval_time: ${late}s
        exp_samples: [{labels: '{namespace="burns",severity="$severity"}', value: 1}]
"""


def rules() -> str:
    """Return the rules."""
    text = Template(HEADER).substitute(job=JOB)
    for objective in OBJECTIVES:
        text += "".join(burn_rate(objective, window) for window in WINDOWS)
        text += "".join(alert(objective, pair) for pair in PAIRS)
    return text


def burn_rate(objective: Objective, window: str) -> str:
    """Return the rule that records the burn rate of an objective in a window."""

    def average(series: str) -> str:
        selected = f'{series}{{job="{JOB}"}}'
        return selected if window == "5m" else f"avg_over_time({selected}[{window}])"

    return Template(BURN_RATE).substitute(
        job=JOB,
        name=objective.name,
        window=window,
        bad=average(objective.bad),
        all=average("job:http_requests:rate5m"),
    )


def alert(objective: Objective, pair: Pair) -> str:
    """Return the alert of an objective for a pair of windows."""
    values = objective._asdict() | pair._asdict()
    return Template(ALERT).substitute(values, job=JOB, anchor=objective.alert.lower())


def tests() -> str:
    """Return the tests of the alerts."""
    groups = [test(objective, pair) for objective in OBJECTIVES for pair in PAIRS]
    return TESTS + "\n".join(groups)


def test(objective: Objective, pair: Pair) -> str:
    """Return the test of one alert: close to each of its thresholds."""
    wait_seconds = pair.wait_minutes * 60
    # Samples until the alert is due, and two more.
    late_seconds = round(wait_seconds * 1.2) + 30
    late_samples = late_seconds // 30 + 1
    factor = float(pair.factor)
    values = objective._asdict() | pair._asdict()
    return Template(TEST).substitute(
        values,
        job=JOB,
        above=round(factor * 1.05, 3),
        below=round(factor * 0.95, 3),
        # Bad requests per second, for 30 s.
        many=round(10.5 / 30, 3),
        few=round(9.5 / 30, 3),
        steps=late_samples,
        early=round(wait_seconds * 0.7),
        late=late_seconds,
    )


def main() -> None:
    """Write both files."""
    (PROMETHEUS / "rules/objectives.yaml").write_text(rules())
    (PROMETHEUS / "tests/objectives.yaml").write_text(tests())


if __name__ == "__main__":
    main()
