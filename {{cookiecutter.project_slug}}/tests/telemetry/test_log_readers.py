"""Readers of the log: each recipe of docs/logs.md, applied to lines of a running service."""

import json
import re
import shlex
import shutil
import subprocess
from datetime import datetime
from typing import Any

import pytest
import yaml

from app.telemetry import gcp_logs
from scripts import dev_services
from tests.otlp_receiver import receiving
from tests.service_process import PROJECT, eventually, serving

pytestmark = pytest.mark.process

DOCUMENT = (PROJECT / "docs/logs.md").read_text()
Line = dict[str, Any]


def block(heading: str, kind: str) -> str:
    """Return the block of code under a heading."""
    section = DOCUMENT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL)
    assert found
    return found[1]


def run(urls: dict[str, str], **settings: str) -> list[Line]:
    """Return the lines of a service with a request, an error and a start."""
    with receiving() as receiver:
        variables = urls | {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "ACCESS_LOG_FLUSH_MS": "0"}
        with serving("tests.trace_routes:app", **variables, **settings) as service:
            service.wait()
            service.get("/items/1")
            service.get("/bug")
            eventually(lambda: service.text.count('"access"') >= 2)
            return service.lines


@pytest.fixture(scope="module")
def urls(database_url: str, redis: dev_services.Redis) -> dict[str, str]:
    return {"DATABASE_URL": database_url, "REDIS_URL": redis.url, "WEB_CONCURRENCY": "1"}


@pytest.fixture(scope="module")
def all_lines(urls: dict[str, str]) -> list[Line]:
    return run(urls, LOG_FORMAT="json")


@pytest.fixture(scope="module")
def access(all_lines: list[Line]) -> Line:
    return next(line for line in all_lines if line["logger"] == "access")


@pytest.fixture(scope="module")
def error(all_lines: list[Line]) -> Line:
    return next(line for line in all_lines if "exception" in line)


def test_loki_finds_its_fields(access: Line) -> None:
    stages: dict[str, Any] = {}
    for stage in yaml.safe_load(block("Loki", "yaml"))["pipeline_stages"]:
        stages |= stage
    names = stages["json"]["expressions"]
    assert set(names.values()) <= access.keys()
    assert stages["labels"].keys() | stages["structured_metadata"].keys() <= names.keys()
    assert stages["timestamp"]["source"] in names
    datetime.fromisoformat(access[names["time"]])
    derived = re.search(r"`(\"trace_id\".*?)`", DOCUMENT)
    assert derived
    assert re.search(derived[1], json.dumps(access, separators=(",", ":")))


def test_datadog_finds_the_stack(error: Line) -> None:
    remappers = json.loads(block("Datadog", "json"))
    for source in remappers:
        first, _, second = source.partition(".")
        assert error[first][second]
    assert {"level", "timestamp", "service", "trace_id", "span_id"} <= error.keys()


def test_cloudwatch_finds_its_fields(access: Line) -> None:
    names = re.findall(r"(?:filter|pct\(|by|sort) ?(\w+)", block("CloudWatch", "text"))
    assert len(names) == 5
    assert set(names) <= access.keys()


def test_collector_finds_its_fields(access: Line) -> None:
    """`gotime`: the layout in Go's notation has milliseconds and the zone."""
    receiver = yaml.safe_load(block("OpenTelemetry's collector", "yaml"))["receivers"]["filelog"]
    operators = {operator["type"]: operator for operator in receiver["operators"]}
    parser = operators["json_parser"]
    trace = parser["trace"]
    sources = [parser["timestamp"], parser["severity"], trace["trace_id"], trace["span_id"]]
    names = [each["parse_from"] for each in sources] + [operators["move"]["from"]]
    assert {name.removeprefix("attributes.") for name in names} <= access.keys()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", access["timestamp"])
    assert re.fullmatch(r"[0-9a-f]{32}", access["trace_id"])


def test_elastic_gets_the_names_of_its_schema(access: Line, error: Line) -> None:
    """Elastic Common Schema; a rename of a field that is missing fails the document."""
    processors = json.loads(block("Elastic", "json"))["processors"]
    for line in (access, error):
        exception = line.get("exception", {})
        fields = line | {f"exception.{name}": value for name, value in exception.items()}
        for processor in processors:
            options = processor["rename"]
            if options["field"] in fields:
                fields[options["target_field"]] = fields.pop(options["field"])
            else:
                assert options["ignore_missing"], options
        assert {"@timestamp", "message", "log.level", "service.name", "trace.id"} <= fields.keys()
    assert fields["error.stack_trace"].startswith("Traceback")


def test_jq_prints_stacks_and_the_slowest_requests(all_lines: list[Line]) -> None:
    if shutil.which("jq") is None:
        pytest.skip("jq is missing")
    text = "".join(f"{json.dumps(line)}\n" for line in all_lines)
    outputs = [
        subprocess.run(shlex.split(command), input=text, capture_output=True, text=True, check=True)
        for command in block("On a terminal", "sh").splitlines()
    ]
    assert "ZeroDivisionError" in outputs[0].stdout
    assert '"route": "/bug"' in outputs[1].stdout


def test_google_cloud_gets_its_special_fields(urls: dict[str, str]) -> None:
    """Cloud Logging, "Structured logging": special JSON fields; `HttpRequest`; `LogSeverity`."""
    lines = run(urls, LOG_FORMAT="gcp", GOOGLE_CLOUD_PROJECT="shop")
    assert {line["severity"] for line in lines} <= {"INFO", "WARNING", "ERROR"}
    assert not any({"level", "timestamp", "trace_id"} & line.keys() for line in lines)
    access = next(line for line in lines if "httpRequest" in line)
    datetime.fromisoformat(access["time"])
    request = access["httpRequest"]
    assert (request["requestMethod"], request["requestUrl"]) == ("GET", "/items/1")
    assert request["status"] == 200
    assert re.fullmatch(r"\d+\.\d+s", request["latency"])
    assert request["responseSize"] == "1"
    assert access["route"] == "/items/{number}"
    assert re.fullmatch(r"projects/shop/traces/\w{32}", access["logging.googleapis.com/trace"])
    assert re.fullmatch(r"\w{16}", access["logging.googleapis.com/spanId"])
    assert access["logging.googleapis.com/trace_sampled"] is True
    error = next(line for line in lines if "stack_trace" in line)
    assert error["severity"] == "ERROR"
    assert error["stack_trace"].startswith("Traceback")


def test_unknown_level_is_default_and_a_trace_without_a_project_its_id(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT", raising=False)
    line = gcp_logs.convert({"level": "level 25", "timestamp": "t", "trace_id": "a"})
    assert line == {"severity": "DEFAULT", "time": "t", "logging.googleapis.com/trace": "a"}


def test_google_cloud_gets_the_flag_of_a_trace_that_is_not_sampled() -> None:
    line = gcp_logs.convert({"level": "info", "timestamp": "t", "trace_flags": "00"})
    assert line["logging.googleapis.com/trace_sampled"] is False
