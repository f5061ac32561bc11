"""A real Prometheus and Alertmanager that watch a service with its rules, thirty times as fast.

The rendering for this test divides every duration of the rules by 30: `for`, ranges, offsets and
the interval of a group. Thresholds stay as they are. So minutes of an outage are seconds here.
"""

import contextlib
import json
import math
import re
import subprocess
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import yaml
from scripts.dev_services import free_port
from tests.service_process import PROJECT, eventually

from prerequisites import program

SPEED = 30
OBSERVE = PROJECT / "deploy/observe"
NAME = "service"
#: The values of the variables of the dashboards.
VARIABLES = {"$__rate_interval": "10s", "$namespace": ".*", "$instance": ".*", "$job": NAME}
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
#: A duration in an expression: a range, a subquery or an offset.
DURATION = re.compile(r"(?<=[\[:])(\d+)([smhd])(?=[\]:])|(?<=offset )(\d+)([smhd])")


def faster(duration: str) -> str:
    """Return a duration divided by `SPEED`, at least a second."""
    seconds = int(duration[:-1]) * UNITS[duration[-1]]
    return f"{max(1, round(seconds / SPEED))}s"


def rendered(text: str) -> str:
    """Return a file of the template as a project has it."""
    text = text.replace("{" * 2 + " cookiecutter.project_slug " + "}" * 2, NAME)
    # In the template, Prometheus' own braces are text in those of Jinja.
    return re.sub(r'\{{2} "(.*?)" \}{2}', r"\1", text)


def fast_rules(path: Path) -> dict[str, Any]:
    """Return the rules of a file with shorter durations."""
    content: dict[str, Any] = yaml.safe_load(rendered(path.read_text()))
    for group in content["groups"]:
        group["interval"] = faster(group["interval"])
        for rule in group["rules"]:
            expression = DURATION.sub(lambda match: faster(match[0]), rule["expr"])
            # The number of bad requests: a sum of samples, times the interval of the group.
            rule["expr"] = expression.replace(") * 30 > ", ") * 1 > ")
            for field in ("for", "keep_firing_for"):
                if field in rule:
                    rule[field] = faster(rule[field])
    return content


class Receiver(ThreadingHTTPServer):
    """Receives the notifications of Alertmanager, by receiver."""

    def __init__(self) -> None:
        self.notified: dict[str, set[str]] = {"pages": set(), "tickets": set(), "advice": set()}
        super().__init__(("127.0.0.1", 0), Notification)


class Notification(BaseHTTPRequestHandler):
    """A request of Alertmanager."""

    server: Receiver

    def do_POST(self) -> None:
        """Note the alerts."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        names = {alert["labels"]["alertname"] for alert in body["alerts"]}
        self.server.notified[self.path.strip("/")] |= names
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


class Watch:
    """Prometheus and Alertmanager during a test."""

    def __init__(self, port: int, receiver: Receiver) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.receiver = receiver

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the result of a query. Raises an error if it is invalid."""
        response = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=30)
        assert response.status_code == 200, response.text
        found: list[dict[str, Any]] = response.json()["data"]["result"]
        return found

    def values(self, expression: str) -> list[float]:
        """Return the values that a query finds, without those that are no number."""
        values = [float(each["value"][1]) for each in self.query(expression)]
        return [value for value in values if not math.isnan(value)]

    def query_range(
        self, expression: str, start: float, end: float, step: int
    ) -> list[dict[str, Any]]:
        """Return the result of a query over time."""
        parameters: dict[str, Any] = {"query": expression, "start": start, "end": end, "step": step}
        response = httpx.get(f"{self.url}/api/v1/query_range", params=parameters, timeout=30)
        assert response.status_code == 200, response.text
        found: list[dict[str, Any]] = response.json()["data"]["result"]
        return found

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire."""
        alerts = httpx.get(f"{self.url}/api/v1/alerts", timeout=30).json()["data"]["alerts"]
        return {each["labels"]["alertname"] for each in alerts if each["state"] == "firing"}

    @property
    def pages(self) -> set[str]:
        """The alerts that have paged so far."""
        return self.receiver.notified["pages"]


def panels_of(dashboard: str) -> list[dict[str, Any]]:
    """Return the panels of a dashboard, by its name."""
    file = OBSERVE / f"grafana/dashboards/{dashboard}.json"
    found: list[dict[str, Any]] = json.loads(rendered(file.read_text()))["panels"]
    return found


def with_values(query: str) -> str:
    """Return a query of a dashboard with the values of its variables."""
    for variable, value in VARIABLES.items():
        query = query.replace(variable, value)
    return query


def queries_of(dashboard: str) -> dict[str, str]:
    """Return the queries of a dashboard, by the title of their panel and their letter."""
    return {
        f"{panel['title']}, {target['refId']}": with_values(target["expr"])
        for panel in panels_of(dashboard)
        for target in panel.get("targets", ())
    }


def queries_without_data(watch: Watch, dashboard: str) -> list[str]:
    """Return the names of the queries of a dashboard that find nothing."""
    return [name for name, query in queries_of(dashboard).items() if not watch.query(query)]


@contextlib.contextmanager
def running(*command: str, log: Path) -> Iterator[None]:
    """Run a program during the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        yield
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        process.wait(30)


def alertmanager_configuration(receiver: Receiver) -> dict[str, Any]:
    """Return the example's configuration, with receivers, and without long waits."""
    content: dict[str, Any] = yaml.safe_load(
        (OBSERVE / "alertmanager/alertmanager.yaml").read_text()
    )
    for each in content["receivers"]:
        url = f"http://127.0.0.1:{receiver.server_port}/{each['name']}"
        each["webhook_configs"] = [{"url": url, "send_resolved": False}]
    for route in (content["route"], *content["route"]["routes"]):
        route |= {"group_wait": "5s", "group_interval": "5s"}
    return content


@contextlib.contextmanager
def watching(directory: Path, targets: Mapping[str, int]) -> Iterator[Watch]:
    """Scrape the targets, ports by job, each second; evaluate the rules; yield what is seen."""
    prometheus = program("prometheus")
    alertmanager = program("prometheus-alertmanager")
    port = free_port()
    alerts_port = free_port()
    for path in (OBSERVE / "prometheus/rules").glob("*.yaml"):
        (directory / f"rules-{path.name}").write_text(yaml.safe_dump(fast_rules(path)))
    scrapes = [
        {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{number}"]}]}
        for job, number in targets.items()
    ]
    configuration = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules-*.yaml"],
        "alerting": {
            "alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{alerts_port}"]}]}]
        },
        "scrape_configs": scrapes,
    }
    (directory / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    with Receiver() as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        file = directory / "alertmanager.yaml"
        file.write_text(yaml.safe_dump(alertmanager_configuration(receiver)))
        first = (
            alertmanager,
            f"--config.file={file}",
            f"--storage.path={directory / 'alerts'}",
            f"--web.listen-address=127.0.0.1:{alerts_port}",
            "--cluster.listen-address=",
        )
        second = (
            prometheus,
            f"--config.file={directory / 'prometheus.yaml'}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        )
        with (
            running(*first, log=directory / "alertmanager.log"),
            running(*second, log=directory / "prometheus.log"),
        ):
            watch = Watch(port, receiver)
            eventually(lambda: httpx.get(f"{watch.url}/-/ready").status_code == 200)
            yield watch
        receiver.shutdown()
