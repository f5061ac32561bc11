"""The real gunicorn over real sockets, with a real Postgres and Redis."""

import concurrent.futures
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from app.serving import healthcheck
from app.settings import Settings
from scripts.dev_services import Redis, free_port, postgres
from tests.service_process import DEADLINE_SECONDS, PROJECT, Service, eventually, frozen, serving

SHARED_MEMORY = Path("/dev/shm")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gunicorn does not run on Windows")


@pytest.fixture(scope="module")
def urls(database_url: str, redis: Redis) -> dict[str, str]:
    return {"DATABASE_URL": database_url, "REDIS_URL": redis.url}


@pytest.fixture(scope="module")
def service(urls: dict[str, str]) -> Iterator[Service]:
    """One service for tests that only ask."""
    with serving("tests.fault_routes:app", **urls) as service:
        service.wait()
        service.wait_for_workers()
        yield service


def count(service: Service, route: str) -> float:
    """Return how many requests a route has answered, as the metrics say."""
    pattern = (
        r"^http_server_request_duration_seconds_count.*http_route=\""
        + re.escape(route)
        + r"\".* (.+)$"
    )
    return sum(map(float, re.findall(pattern, service.metrics(), re.MULTILINE)))


def states(service: Service) -> dict[str, str]:
    """Return what readiness says of each dependency."""
    return {
        name: check["status"]
        for name, check in service.get("/health/ready").json()["checks"].items()
    }


def of_request(service: Service, request_id: str) -> list[dict[str, Any]]:
    """Return the lines that a request has left."""
    return [line for line in service.lines if line.get("request_id") == request_id]


def test_answers_carry_an_id_and_no_server_header(service: Service) -> None:
    answer = service.get("/", **{"X-Request-ID": "from-outside"})
    assert answer.json() == {"service": Settings().service_name, "version": "0.0.0"}
    assert answer.headers["x-request-id"] == "from-outside"
    assert "server" not in answer.headers


def test_the_health_check_of_the_image_tells_200_from_the_rest(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIND", f"0.0.0.0:{service.port}")
    assert healthcheck.check()
    assert not healthcheck.check("/absent")
    monkeypatch.setenv("BIND", "")
    monkeypatch.setenv("PORT", str(free_port()))
    assert not healthcheck.check()  # nobody listens


def test_requests_over_all_workers_are_all_counted(service: Service) -> None:
    # Of no other test: what these have asked may be counted only now.
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        answers = list(
            pool.map(
                lambda _: service.get("/slow?seconds=0", **{"X-Request-ID": "many"}), range(300)
            )
        )
    assert {answer.status_code for answer in answers} == {200}
    eventually(lambda: count(service, "/slow") == 300)
    eventually(lambda: len(of_request(service, "many")) == 300)
    assert len({line["pid"] for line in of_request(service, "many")}) == 2
    assert "http_server_active_requests 0.0" in service.metrics()


def test_a_bug_is_a_problem_outside_and_one_line_with_traceback_inside(service: Service) -> None:
    answer = service.get("/bug", **{"X-Request-ID": "bug-1"})
    assert answer.status_code == 500
    assert answer.json()["request_id"] == "bug-1"
    assert "41111111" not in answer.text
    eventually(lambda: len(of_request(service, "bug-1")) == 2)  # the access line follows the answer
    lines = of_request(service, "bug-1")
    assert [(line["logger"], line["level"]) for line in lines] == [
        ("app.observe", "error"),
        ("access", "info"),
    ]
    assert lines[0]["exception"]["type"] == "RuntimeError"
    assert "in bug" in lines[0]["exception"]["traceback"]


def test_an_answer_that_breaks_off_is_seen_as_broken_off(service: Service) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        service.get("/broken-stream")


@pytest.mark.parametrize("forged", ['a"b', "x" * 8000, "a b"])
def test_a_forged_request_id_appears_nowhere(service: Service, forged: str) -> None:
    answer = service.get("/nowhere", **{"X-Request-ID": forged})
    made = answer.headers["x-request-id"]
    assert forged not in answer.text + made
    eventually(lambda: of_request(service, made))  # the line of this request is written
    assert forged not in str(service.lines)


def test_a_killed_worker_is_replaced_and_stays_counted(service: Service) -> None:
    for _ in range(20):
        service.get("/events?seconds=0", **{"X-Request-ID": "few"})
    eventually(lambda: count(service, "/events") == 20)  # of no other test
    eventually(lambda: of_request(service, "few"))
    victim = of_request(service, "few")[-1]["pid"]
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: f"Worker (pid:{victim}) was sent SIGKILL" in service.text)
    service.wait_for_workers(3)
    assert count(service, "/events") == 20


def test_a_broken_file_of_a_killed_worker_does_not_end_the_master(
    urls: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("metrics")
    with serving(PROMETHEUS_MULTIPROC_DIR=str(folder), **urls) as service:
        service.wait()
        service.get("/")
        eventually(lambda: list(folder.glob("histogram_*.db")))
        broken = next(folder.glob("histogram_*.db"))  # of a worker; the other may have one too
        worker = psutil.Process(int(broken.stem.split("_")[1]))
        worker.suspend()  # or it writes this number again
        with broken.open("r+b") as file:
            file.write(b"\xff\xff\xff\x7f")  # the number of bytes in use
        answer = service.http.get(f"http://127.0.0.1:{service.metrics_port}/metrics")
        assert (answer.status_code, answer.text) == (500, "the scrape failed; the log says why\n")
        worker.kill()
        eventually(lambda: f"the counts in {broken.name} are lost" in service.text)
        assert "a scrape failed" in {line["message"] for line in service.lines}
        service.wait()
        answer = service.http.get(f"http://127.0.0.1:{service.metrics_port}/metrics")
        assert answer.status_code == 200, service.text


def test_no_password_is_in_the_output(service: Service, urls: dict[str, str]) -> None:
    password = urls["DATABASE_URL"].split(":")[2].split("@")[0]
    assert password not in service.text


def test_the_start_says_how_it_is_sized(service: Service) -> None:
    (line,) = [line for line in service.lines if line["logger"] == "app.sizing"]
    assert line["message"].startswith(
        "2 workers, 4 database connections for each: WEB_CONCURRENCY=2"
    )


def test_a_term_lets_requests_finish_and_ends_cleanly(urls: dict[str, str]) -> None:
    with serving("tests.fault_routes:app", RETIRE_SECONDS="0", **urls) as service:
        service.wait()
        service.wait_for_workers()
        with socket.create_connection(
            ("127.0.0.1", service.port), timeout=DEADLINE_SECONDS
        ) as slow:
            slow.sendall(b"POST /length HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n")
            eventually(lambda: "http_server_active_requests 1.0" in service.metrics())
            service.process.send_signal(signal.SIGTERM)
            eventually(lambda: "Waiting for connections to close" in service.text)
            slow.sendall(b"abc")
            answer = slow.recv(4096)
            assert (answer[:12], answer[-1:]) == (b"HTTP/1.1 200", b"3")
            assert service.process.wait(DEADLINE_SECONDS) == 0
        messages = [line["message"] for line in service.lines]
        assert messages.count("Application shutdown complete.") == 2
        assert messages.count("atexit ran") >= 2
        assert messages[-1] == "Shutting down: Master" or messages[-1] == "atexit ran"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_an_interrupt_waits_for_no_request(urls: dict[str, str], number: int) -> None:
    with serving("tests.fault_routes:app", RETIRE_SECONDS="20", **urls) as service:
        service.wait()
        service.wait_for_workers()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            pool.submit(service.get, "/slow?seconds=30")
            eventually(lambda: "http_server_active_requests 1.0" in service.metrics())
            start = time.monotonic()
            assert service.stop(number) == 0
            assert time.monotonic() - start < 10  # 2 where the machine has time; 20 if it retired
        assert [line["message"] for line in service.lines].count(
            "Application shutdown complete."
        ) == 2


def test_nothing_is_left_behind(urls: dict[str, str]) -> None:
    with serving(**urls) as service:
        service.wait()
        master = psutil.Process(service.process.pid)
        eventually(lambda: len(master.children()) == 3)  # two workers and the metrics process
        children = master.children()
        assert service.stop() == 0
        _, alive = psutil.wait_procs(children, DEADLINE_SECONDS)
        assert alive == []
        assert list(SHARED_MEMORY.glob(f"metrics-{service.process.pid}-*")) == []


def test_all_processes_end_with_a_killed_master(urls: dict[str, str]) -> None:
    with serving(**urls) as service:
        service.wait()
        children = psutil.Process(service.process.pid).children(recursive=True)
        service.process.kill()
        service.process.wait()
        _, alive = psutil.wait_procs(children, DEADLINE_SECONDS)
        for process in alive:
            process.kill()
        assert alive == []
    for folder in SHARED_MEMORY.glob(f"metrics-{service.process.pid}-*"):
        shutil.rmtree(folder)


def test_with_nothing_there_it_starts_is_live_and_recovers(redis: Redis) -> None:
    with postgres() as server:
        server.stop()
        urls = {"DATABASE_URL": server.url, "REDIS_URL": f"redis://127.0.0.1:{free_port()}"}
        with serving(
            READINESS_TIMEOUT_SECONDS="10", **urls
        ) as service:  # Postgres may be slow when it is back
            service.wait("/health/startup")
            assert service.get("/health/live").status_code == 200
            ready = service.get("/health/ready")
            assert (ready.status_code, ready.json()["status"]) == (503, "not_ready")
            assert {check["status"] for check in ready.json()["checks"].values()} == {"unhealthy"}
            server.start()
            recovered = {"postgres": "healthy", "redis": "unhealthy"}
            eventually(
                lambda: states(service) == recovered
            )  # another worker may know it up to a second later
            lines = [line["message"] for line in service.lines if line["logger"] == "app.health"]
            for text in ("postgres unavailable", "redis unavailable"):
                assert 1 <= lines.count(text) <= 2  # one for each worker, not one for each try


def test_a_postgres_that_stops_or_freezes_makes_it_unready_and_nothing_else(redis: Redis) -> None:
    with postgres() as server, serving(DATABASE_URL=server.url, REDIS_URL=redis.url) as service:
        service.wait()

        def others_are_well() -> None:
            assert service.get("/health/live").status_code == 200
            assert service.get("/health/startup").status_code == 200

        with frozen(server.pid):
            service.wait("/health/ready", 503)
            others_are_well()
        service.wait("/health/ready", 200)
        server.stop()
        service.wait("/health/ready", 503)
        others_are_well()
        server.start()
        service.wait("/health/ready", 200)
        assert "Traceback" not in service.text


def test_a_redis_that_freezes_is_reported_only(urls: dict[str, str], redis: Redis) -> None:
    with serving(
        READINESS_TIMEOUT_SECONDS="10", **urls
    ) as service:  # Postgres may be slow; the cache has its own
        service.wait()
        with frozen(redis.pid):
            eventually(lambda: states(service)["redis"] == "unhealthy")
            assert service.get("/health/ready").status_code == 200
        eventually(lambda: states(service)["redis"] == "healthy")


def test_a_hangup_replaces_the_workers_and_reads_nothing_anew(
    urls: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    secrets = tmp_path_factory.mktemp("secrets")
    with serving(SECRETS_DIR=str(secrets), READINESS_TIMEOUT_SECONDS="10", **urls) as service:
        service.wait()
        service.wait_for_workers()
        for _ in range(10):
            service.get("/")
        eventually(lambda: count(service, "/") == 10)
        before = {child.pid for child in psutil.Process(service.process.pid).children()}
        (secrets / "LOG_LEVEL").write_text("nonsense")
        service.process.send_signal(signal.SIGHUP)
        eventually(lambda: service.text.count("Worker exiting") == 2)
        eventually(lambda: len(psutil.Process(service.process.pid).children()) == 3)
        after = {child.pid for child in psutil.Process(service.process.pid).children()}
        assert len(after & before) == 1  # the metrics process
        assert count(service, "/") == 10
        assert {line["level"] for line in service.lines} == {"info"}


def test_a_killed_metrics_process_is_replaced(service: Service) -> None:
    before = count(service, "/health/live")
    workers = {
        line["pid"]
        for line in service.lines
        if line["message"].startswith("Started server process")
    }
    (victim,) = (c for c in psutil.Process(service.process.pid).children() if c.pid not in workers)
    victim.kill()
    eventually(lambda: not victim.is_running())
    eventually(lambda: count(service, "/health/live") == before)


def test_usr2_is_one_line(service: Service) -> None:
    service.process.send_signal(signal.SIGUSR2)
    eventually(lambda: "SIGUSR2 is ignored" in service.text)
    assert service.get("/").status_code == 200


def test_only_metrics_are_at_the_metrics_address(service: Service) -> None:
    address = f"http://127.0.0.1:{service.metrics_port}"
    assert [
        service.http.get(address + path).status_code for path in ("/metrics", "/", "/docs")
    ] == [200, 404, 404]


def test_a_start_that_fails_leaves_nothing_behind(urls: dict[str, str]) -> None:
    environment = (
        os.environ | urls | {"BIND": "192.0.2.1:80", "METRICS_BIND": f"127.0.0.1:{free_port()}"}
    )
    run = [sys.executable, "-m", "gunicorn"]
    process = subprocess.Popen(
        run, cwd=PROJECT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    assert process.wait(60) == 1
    assert list(SHARED_MEMORY.glob(f"metrics-{process.pid}-*")) == []


def test_an_address_that_is_taken_is_one_clear_line(service: Service, urls: dict[str, str]) -> None:
    taken = f"127.0.0.1:{service.metrics_port}"
    assert (
        refusal(METRICS_BIND=taken, **urls)
        == f"configuration error: METRICS_BIND={taken}: cannot listen there: "
    )


def test_a_metrics_folder_that_another_instance_uses_is_one_clear_line(
    urls: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = str(tmp_path_factory.mktemp("metrics"))
    with serving(PROMETHEUS_MULTIPROC_DIR=folder, **urls) as service:
        service.wait()
        expected = f"configuration error: PROMETHEUS_MULTIPROC_DIR={folder}: another instance uses it; name another"
        assert refusal(PROMETHEUS_MULTIPROC_DIR=folder, **urls).startswith(expected)


def refusal(**settings: str) -> str:
    """Return what a start that fails prints on stderr, up to the system's own words."""
    addresses = {"BIND": f"127.0.0.1:{free_port()}", "METRICS_BIND": f"127.0.0.1:{free_port()}"}
    environment = os.environ | addresses | settings
    done = subprocess.run(
        [sys.executable, "-m", "gunicorn"],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    line = done.stderr.decode()
    assert line.count("\n") == 1
    return re.sub(r"Address.*\n", "", line)


def test_a_root_path_is_that_of_the_proxy(urls: dict[str, str]) -> None:
    with serving(ROOT_PATH="/api", DOCS_ENABLED="true", **urls) as service:
        service.wait()
        assert service.get("/openapi.json").json()["servers"] == [{"url": "/api"}]
        body = {"amount": 1, "currency": "EUR", "reference": "a"}  # example
        created = service.http.post(
            "/payments", json=body, headers={"Idempotency-Key": "a"}
        )  # example
        assert created.headers["location"].startswith("/api/payments/")  # example
