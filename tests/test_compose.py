"""The compose stack on one machine: `make up`, `make edge`, load, `make down`."""

import functools
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from attack.load import GET, GET_NEW, POST, POST_NEW, load
from scripts.ports import eventually, free_port
from tests.conftest import Bake, bake_to, missing
from tests.containers import (
    RABBITMQ,
    docker,
    inspect,
    is_available,
    is_healthy,
    is_present,
    logs,
    needs_engine,
    published,
)
from tests.projects import make

pytestmark = [pytest.mark.slow, pytest.mark.engine]
PROJECT = "parcels"
NETWORK = "10.203.72"
PAYMENT = {"amount": 1250, "currency": "EUR", "reference": "compose"}
#: Debian has no packages of them, so that `.ci/engine` cannot build substitutes.
PULLED_ONLY = {"grafana", "jaeger"}
#: The instances that Prometheus scrapes with SCALE=2, by job.
TARGETS = {PROJECT: 2, f"{PROJECT}-consumer": 1, f"{PROJECT}-jobs": 1, "nginx": 1}
#: The tests are about containers that start and stop. On a machine that runs other suites as well,
#: a connection to Postgres may take longer than the second after which a service responds 503.
ENVIRONMENT = "    POSTGRES_MAX_CONNECTIONS: 200\n"
PATIENT = f"{ENVIRONMENT}    DATABASE_ACQUIRE_TIMEOUT_SECONDS: 10\n"
LABEL = f"--filter=label=com.docker.compose.project={PROJECT}"


@pytest.fixture(scope="module")
def ports() -> dict[str, str]:
    """Free ports and a free network, in place of the defaults in the README."""
    return {
        "HTTP_PORT": str(free_port()),
        "METRICS_PORT": str(free_port()),
        "EDGE_PORT": str(free_port()),
        "EDGE_NETWORK": NETWORK,
        "PROMETHEUS_PORT": str(free_port()),
        "ALERTMANAGER_PORT": str(free_port()),
        "GRAFANA_PORT": str(free_port()),
        "JAEGER_PORT": str(free_port()),
    }


@pytest.fixture(scope="module")
def project(
    template: Path, tmp_path_factory: pytest.TempPathFactory, ports: dict[str, str]
) -> Iterator[Path]:
    """A new project; its containers and images are removed in any case."""
    needs_engine()
    output = tmp_path_factory.mktemp("compose")
    path = bake_to(template, output, project_slug=PROJECT, include_jobs=True)
    compose = path / "compose.yaml"
    text = compose.read_text()
    assert text.count(ENVIRONMENT) == 1
    compose.write_text(text.replace(ENVIRONMENT, PATIENT))
    yield path
    make(path, "down", **ports)
    docker("image", "rm", "--force", *docker("image", "ls", "--quiet", PROJECT).split())


def containers(service: str = "") -> list[str]:
    """Return the containers of the project, or of one service; stopped ones too."""
    filters = [LABEL]
    if service:
        filters.append(f"--filter=label=com.docker.compose.service={service}")
    return docker("ps", "--all", "--quiet", *filters).split()


def has_served_payments(name: str) -> bool:
    """Return whether a container has served payments since its last start."""
    return "/payments" in docker("logs", "--since", inspect(name)["State"]["StartedAt"], name)


@pytest.fixture(scope="module")
def up(project: Path, ports: dict[str, str]) -> str:
    """The base URL of the service, once `make up` has returned."""
    make(project, "up", **ports)
    return f"http://127.0.0.1:{ports['HTTP_PORT']}"


@pytest.fixture(scope="module")
def edge(project: Path, ports: dict[str, str], up: str) -> int:
    """The port of nginx in front of two instances, once `make edge` has returned."""
    make(project, "edge", SCALE="2", **ports)
    return int(ports["EDGE_PORT"])


def test_up_returns_when_everything_is_ready(up: str, ports: dict[str, str]) -> None:
    """The database is migrated, and consumer and gateway settle a payment."""
    ready = httpx.get(f"{up}/health/ready")
    assert ready.status_code == 200
    assert {check["status"] for check in ready.json()["checks"].values()} == {"healthy"}
    response = httpx.post(f"{up}/payments", json=PAYMENT, headers={"Idempotency-Key": "compose-1"})
    assert response.status_code == 201
    payment = f"{up}{response.headers['location']}"
    eventually(lambda: httpx.get(payment).json()["status"] == "settled")
    assert httpx.get(f"{up}/").json()["service"] == PROJECT
    metrics = httpx.get(f"http://127.0.0.1:{ports['METRICS_PORT']}/metrics").text
    assert 'dependency_up{dependency="postgres"} 1.0' in metrics


def created_by(response: httpx.Response) -> str:
    """Return the path of what a POST has created."""
    assert response.is_success, response.text
    return response.headers["location"]


def end_conversation(address: str) -> dict[str, Any]:
    """Create a job over HTTP, and return it once it has ended."""
    lines = {"lines": ["It works, thanks"]}
    created = created_by(httpx.post(f"{address}/conversations", json=lines))
    job = created_by(httpx.post(f"{address}{created}/end"))
    eventually(lambda: httpx.get(f"{address}{job}").json()["status"] == "succeeded")
    found: dict[str, Any] = httpx.get(f"{address}{job}").json()
    return found


def test_worker_does_jobs_without_a_broker(up: str) -> None:
    assert len(containers("jobs")) == 1
    assert end_conversation(up)["result"] == {"score": 100}
    assert containers("rabbitmq") == []


def assert_restricted(names: list[str]) -> None:
    for name in names:
        host = inspect(name)["HostConfig"]
        assert host["ReadonlyRootfs"], name
        assert host["CapDrop"] == ["ALL"], name
        assert "no-new-privileges:true" in host["SecurityOpt"], name
        user = inspect(name)["Config"]["User"]
        assert user, "runs as root"
        assert user.partition(":")[0] not in {"0", "root"}, name


def test_every_container_is_restricted(edge: int) -> None:
    assert_restricted(containers())


def test_password_is_only_in_files(project: Path, up: str) -> None:
    password = (project / ".secrets/postgres_password").read_text()
    assert len(password) >= 24
    for name in containers():
        assert password not in json.dumps(inspect(name)), name
        assert password not in logs(name)


def test_request_id_is_in_all_logs_and_client_comes_from_nginx(edge: int) -> None:
    """The logged client is the address that connected to nginx, not a claimed one."""
    claimed = {
        "X-Request-ID": "over-the-edge-1",
        "X-Forwarded-For": "203.0.113.7",
        "X-Forwarded-Proto": "https",
    }
    response = httpx.get(f"http://127.0.0.1:{edge}/", headers=claimed)
    assert response.headers["x-request-id"] == "over-the-edge-1"
    generated = httpx.get(f"http://127.0.0.1:{edge}/").headers["x-request-id"]

    def lines() -> list[str]:
        return [line for name in containers("api") for line in logs(name).splitlines()]

    def are_ids_in_all_logs() -> bool:
        of_services = "".join(lines())
        of_nginx = logs(containers("nginx")[0])
        return all(
            request_id in text
            for request_id in ("over-the-edge-1", generated)
            for text in (of_services, of_nginx)
        )

    eventually(are_ids_in_all_logs)
    line = next(json.loads(line) for line in lines() if "over-the-edge-1" in line)
    assert line["client"].startswith(NETWORK)
    assert "203.0.113.7" not in json.dumps(lines())


def test_nginx_removes_the_trace_of_a_client(edge: int) -> None:
    """Its flag would decide in place of the sampler. The service logs the trace of a caller."""
    port = published(containers("api")[0], 8000)
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    forced = {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01", "tracestate": "vendor=forced"}
    for request_id, address in (("through-nginx", edge), ("past-nginx", port)):
        headers = forced | {"X-Request-ID": request_id}
        assert httpx.get(f"http://127.0.0.1:{address}/", headers=headers).status_code == 200

    def line_of(request_id: str) -> dict[str, Any] | None:
        lines = [line for name in containers("api") for line in logs(name).splitlines()]
        found = [json.loads(line) for line in lines if request_id in line]
        return found[0] if found else None

    eventually(lambda: line_of("through-nginx") and line_of("past-nginx"))
    through = line_of("through-nginx") or {}
    past = line_of("past-nginx") or {}
    assert "trace_id" not in through
    assert past["trace_id"] == trace_id


def test_forwarded_headers_from_other_peers_are_ignored(edge: int) -> None:
    name = containers("api")[0]
    port = published(name, 8000)
    headers = {"X-Request-ID": "past-the-edge-1", "X-Forwarded-For": "203.0.113.8"}
    assert httpx.get(f"http://127.0.0.1:{port}/", headers=headers).status_code == 200
    eventually(lambda: "past-the-edge-1" in logs(name))
    assert "203.0.113.8" not in logs(name)


def test_stopping_instances_under_load_loses_no_request(edge: int) -> None:
    """`docker stop` once for each instance, one after the other.

    The second stops only after the first has served payments again: nginx uses it again.
    """
    one, other = containers("api")
    with load(edge, 8 * [GET], 4 * [GET_NEW], 4 * [POST], 4 * [POST_NEW]) as result:
        time.sleep(1)
        for name in (one, other):
            docker("stop", name)
            assert inspect(name)["State"]["ExitCode"] == 0
            assert inspect(name)["State"]["OOMKilled"] is False
            docker("start", name)
            eventually(functools.partial(is_healthy, name))
            eventually(functools.partial(has_served_payments, name))
    assert result.failures == [], str(result)
    print(f"docker stop under load behind nginx: {result}")


def test_killing_both_instances_under_load_loses_some_requests(edge: int) -> None:
    """The control: the load above can fail. Of one instance, nginx repeats the requests."""
    both = containers("api")
    with load(edge, 8 * [GET], 4 * [GET_NEW], 8 * [POST], 8 * [POST_NEW]) as result:
        time.sleep(0.5)
        docker("kill", *both)
        eventually(lambda: result.failures)
        docker("start", *both)
        for name in both:
            eventually(functools.partial(is_healthy, name))
    assert result.failures


def test_rabbitmq_hands_out_jobs_to_more_workers(project: Path, edge: int) -> None:
    """`make edge RABBITMQ=1 JOB_WORKERS=2`. Its password is only in files, as that of Postgres."""
    if not is_present(RABBITMQ):
        missing(f"the image {RABBITMQ} (`.ci/engine` builds a substitute on Debian)")
    ports = {"EDGE_PORT": str(edge), "EDGE_NETWORK": NETWORK}
    make(project, "edge", SCALE="2", RABBITMQ="1", JOB_WORKERS="2", **ports)
    (broker,) = containers("rabbitmq")
    workers = containers("jobs")
    assert len(workers) == 2
    assert_restricted([broker, *workers])
    assert end_conversation(f"http://127.0.0.1:{edge}")["result"] == {"score": 100}
    listing = ["exec", broker, "rabbitmqctl", "--quiet", "list_consumers", "queue_name"]
    eventually(lambda: docker(*listing).split().count(f"{PROJECT}.jobs") == len(workers))
    password = (project / ".secrets/rabbitmq.conf").read_text().split()[-1]
    for name in (broker, *workers):
        assert password not in json.dumps(inspect(name)), name
        assert password not in logs(name)
    for name in workers:
        docker("stop", name)
        assert inspect(name)["State"]["ExitCode"] == 0
    make(project, "edge", SCALE="2", **ports)
    assert containers("rabbitmq") == []
    assert end_conversation(f"http://127.0.0.1:{edge}")["result"] == {"score": 100}


def keep_available_services(project: Path) -> set[str]:
    """Remove the services of `make observe` whose images cannot be pulled; return the others."""
    file = project / "compose.observe.yaml"
    content = yaml.safe_load(file.read_text())
    for name, service in list(content["services"].items()):
        if is_available(service["image"]):
            continue
        if name not in PULLED_ONLY:
            missing(f"{service['image']} (`.ci/engine` builds a substitute on Debian)")
        del content["services"][name]
    file.write_text(yaml.safe_dump(content))
    return set(content["services"])


def healthy_targets(prometheus: str) -> dict[str, int]:
    """Return the number of targets of each job, or nothing while one of them is not up."""
    targets = query(prometheus, "targets?state=active")["activeTargets"]
    if any(target["health"] != "up" for target in targets):
        return {}
    return dict(Counter(target["scrapePool"] for target in targets))


def query(prometheus: str, path: str) -> Any:
    """Return the data of a response of Prometheus."""
    return httpx.get(f"{prometheus}/api/v1/{path}").raise_for_status().json()["data"]


def test_observe_scrapes_every_instance_and_has_rules_and_alertmanager(
    project: Path, ports: dict[str, str], edge: int
) -> None:
    started = keep_available_services(project)
    # Without a receiver of traces, the other containers stay as they are: 20 s.
    traces = {} if "jaeger" in started else {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}
    make(project, "observe", SCALE="2", **ports, **traces)
    assert_restricted([name for service in started for name in containers(service)])
    prometheus = f"http://127.0.0.1:{ports['PROMETHEUS_PORT']}"
    eventually(lambda: healthy_targets(prometheus) == TARGETS)
    eventually(lambda: query(prometheus, "query?query=nginx_up==1")["result"])
    groups = query(prometheus, "rules")["groups"]
    rules = project / "deploy/observe/prometheus/rules"
    assert {Path(group["file"]).name for group in groups} == {path.name for path in rules.iterdir()}
    assert all(rule["health"] != "err" for group in groups for rule in group["rules"])
    (alertmanager,) = query(prometheus, "alertmanagers")["activeAlertmanagers"]
    address = alertmanager["url"].replace("/api/v2/alerts", "/api/v2/status")
    (container,) = containers("prometheus")
    status = docker("exec", container, "wget", "-q", "-O", "-", address)
    assert "RequiredDependencyDown" in json.loads(status)["config"]["original"]


@pytest.mark.parametrize("include_jobs", [True, False])
@pytest.mark.parametrize("include_example", [True, False])
def test_compose_accepts_every_combination_of_parts(
    bake: Bake, include_example: bool, include_jobs: bool
) -> None:
    """`docker compose config`, with each profile and with the files that the project has."""
    needs_engine()
    path = bake(include_example=include_example, include_jobs=include_jobs)
    added = [file.name for file in path.glob("compose.*.yaml")]
    for names in ({"compose.yaml"}, {"compose.yaml", *added}):
        files = [f"--file={path / name}" for name in sorted(names, reverse=True)]
        for profiles in ([], ["--profile=edge"]):
            options = ["--env-file", "/dev/null", *files, *profiles]
            docker("compose", *options, "config", "--quiet")


def test_down_removes_everything(project: Path, edge: int, ports: dict[str, str]) -> None:
    make(project, "down", **ports)
    assert containers() == []
    assert docker("volume", "ls", "--quiet", LABEL) == ""
    assert docker("network", "ls", "--quiet", LABEL) == ""
    assert not (project / ".secrets").exists()
