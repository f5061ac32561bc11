"""The whole stack on one machine, by the commands of the README: up, behind nginx, stopped under load, down."""

import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from cookiecutter.main import cookiecutter

from attack.load import GET, GET_NEW, POST, POST_NEW, load
from tests.containers import (
    docker,
    eventually,
    free_port,
    inspect,
    logs,
    make,
    needs_engine,
    published,
)

pytestmark = [pytest.mark.slow, pytest.mark.engine]
PROJECT, NETWORK = "parcels", "10.203.72"
PAYMENT = {"amount": 1250, "currency": "EUR", "reference": "compose"}


@pytest.fixture(scope="module")
def ports() -> dict[str, str]:
    """Ports and a network that are free; without these the stack takes those of the README."""
    ports = {
        "HTTP_PORT": str(free_port()),
        "METRICS_PORT": str(free_port()),
        "EDGE_PORT": str(free_port()),
    }
    return {**ports, "EDGE_NETWORK": NETWORK}


@pytest.fixture(scope="module")
def project(
    template: Path, tmp_path_factory: pytest.TempPathFactory, ports: dict[str, str]
) -> Iterator[Path]:
    """A new project; what it has started is ended, whatever happens."""
    needs_engine()
    answers = {"project_slug": PROJECT}
    output = str(tmp_path_factory.mktemp("compose"))
    path = cookiecutter(
        str(template), no_input=True, default_config=True, output_dir=output, extra_context=answers
    )
    yield Path(path)
    make(Path(path), "down", **ports)
    docker("image", "rm", "--force", *docker("image", "ls", "--quiet", PROJECT).split())


def containers(service: str = "") -> list[str]:
    """Return the containers of the project, or of one of its services, those that have ended too."""
    label = (
        f"com.docker.compose.service={service}"
        if service
        else f"com.docker.compose.project={PROJECT}"
    )
    filters = [f"--filter=label=com.docker.compose.project={PROJECT}", f"--filter=label={label}"]
    return docker("ps", "--all", "--quiet", *filters).split()


def healthy(name: str) -> bool:
    """Tell whether the container's own check says so."""
    return bool(inspect(name)["State"]["Health"]["Status"] == "healthy")


def is_asked(name: str) -> bool:
    """Tell whether a container has served payments since it was started last."""
    return "/payments" in docker("logs", "--since", inspect(name)["State"]["StartedAt"], name)


@pytest.fixture(scope="module")
def up(project: Path, ports: dict[str, str]) -> str:
    """The address of the service, once `make up` has returned."""
    make(project, "up", **ports)
    return f"http://127.0.0.1:{ports['HTTP_PORT']}"


@pytest.fixture(scope="module")
def edge(project: Path, ports: dict[str, str], up: str) -> int:
    """The port of nginx before two instances, once `make edge` has returned."""
    make(project, "edge", SCALE="2", **ports)
    return int(ports["EDGE_PORT"])


def test_up_returns_when_everything_is_ready(up: str, ports: dict[str, str]) -> None:
    ready = httpx.get(f"{up}/health/ready")
    assert ready.status_code == 200
    assert {check["status"] for check in ready.json()["checks"].values()} == {"healthy"}
    answer = httpx.post(f"{up}/payments", json=PAYMENT, headers={"Idempotency-Key": "compose-1"})
    assert answer.status_code == 201  # so its migration has run
    payment = f"{up}{answer.headers['location']}"
    eventually(
        lambda: httpx.get(payment).json()["status"] == "settled"
    )  # so the consumer and its gateway work
    assert httpx.get(f"{up}/").json()["service"] == PROJECT
    metrics = httpx.get(f"http://127.0.0.1:{ports['METRICS_PORT']}/metrics").text
    assert 'dependency_up{dependency="postgres"} 1.0' in metrics


def test_every_container_is_restricted(edge: int) -> None:
    for name in containers():
        host = inspect(name)["HostConfig"]
        assert host["ReadonlyRootfs"], name
        assert host["CapDrop"] == ["ALL"], name
        assert "no-new-privileges:true" in host["SecurityOpt"], name
        user = inspect(name)["Config"]["User"]
        assert user, "runs as root"
        assert user.partition(":")[0] not in {"0", "root"}, name


def test_the_password_is_in_files_alone(project: Path, up: str) -> None:
    password = (project / ".secrets/postgres_password").read_text()
    assert len(password) >= 24
    for name in containers():
        assert password not in json.dumps(inspect(name)), name
        assert password not in logs(name)


def test_one_id_is_in_all_logs_and_the_clients_address_is_nginx_word_alone(edge: int) -> None:
    headers = {
        "X-Request-ID": "over-the-edge-1",
        "X-Forwarded-For": "203.0.113.7",
        "X-Forwarded-Proto": "https",
    }
    answer = httpx.get(f"http://127.0.0.1:{edge}/", headers=headers)
    assert answer.headers["x-request-id"] == "over-the-edge-1"
    given = httpx.get(f"http://127.0.0.1:{edge}/").headers["x-request-id"]

    def lines() -> list[str]:
        return [line for name in containers("api") for line in logs(name).splitlines()]

    def everywhere() -> bool:
        texts = "".join(lines()), logs(containers("nginx")[0])
        return all(
            request_id in text for request_id in ("over-the-edge-1", given) for text in texts
        )

    eventually(everywhere)
    line = next(json.loads(line) for line in lines() if "over-the-edge-1" in line)
    assert line["client"].startswith(NETWORK)  # whoever asked nginx, and not what was claimed
    assert "203.0.113.7" not in json.dumps(lines())


def test_whoever_is_not_nginx_is_not_believed(edge: int) -> None:
    name = containers("api")[0]
    port = published(name, 8000)
    headers = {"X-Request-ID": "past-the-edge-1", "X-Forwarded-For": "203.0.113.8"}
    assert httpx.get(f"http://127.0.0.1:{port}/", headers=headers).status_code == 200
    eventually(lambda: "past-the-edge-1" in logs(name))
    assert "203.0.113.8" not in logs(name)


def test_an_instance_that_is_stopped_under_load_costs_no_request(edge: int) -> None:
    """`docker stop` once for each instance; the first is started again before the second is stopped."""
    one, other = containers("api")
    with load(edge, 8 * [GET], 4 * [GET_NEW], 4 * [POST], 4 * [POST_NEW]) as result:
        time.sleep(1)
        for name in (one, other):
            docker("stop", name)
            assert inspect(name)["State"]["ExitCode"] == 0
            assert inspect(name)["State"]["OOMKilled"] is False
            docker("start", name)
            eventually(functools.partial(healthy, name))
            eventually(functools.partial(is_asked, name))  # so nginx knows it again
    assert result.failures == [], str(result)
    print(f"docker stop under load behind nginx: {result}")


def test_the_same_instance_killed_costs_some(edge: int) -> None:
    """The load above can fail."""
    one, _ = containers("api")
    with load(edge, 8 * [GET], 4 * [GET_NEW], 8 * [POST], 8 * [POST_NEW]) as result:
        for _ in range(5):
            time.sleep(0.5)
            docker("kill", one)
            docker("start", one)
            eventually(functools.partial(healthy, one))
            if result.failures:
                break
    assert result.failures


def test_down_leaves_nothing(project: Path, edge: int, ports: dict[str, str]) -> None:
    make(project, "down", **ports)
    label = f"--filter=label=com.docker.compose.project={PROJECT}"
    assert containers() == []
    assert docker("volume", "ls", "--quiet", label) == ""
    assert docker("network", "ls", "--quiet", label) == ""
    assert not (project / ".secrets").exists()
