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
#: For tests that need a healthy Postgres: it can be slow right after its start.
PATIENT = {"READINESS_TIMEOUT_SECONDS": "10"}
FAULT_ROUTES = "tests.fault_routes:app"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gunicorn does not run on Windows")


@pytest.fixture(scope="module")
def urls(database_url: str, redis: Redis) -> dict[str, str]:
    return {"DATABASE_URL": database_url, "REDIS_URL": redis.url}


@pytest.fixture(scope="module")
def service(urls: dict[str, str]) -> Iterator[Service]:
    """One service for the tests that do not stop it."""
    with serving(FAULT_ROUTES, **urls) as service:
        service.wait()
        service.wait_for_workers()
        yield service


def count(service: Service, route: str) -> float:
    """Return the number of requests to a route, from the metrics."""
    name = "http_server_request_duration_seconds_count"
    label = re.escape(f'http_route="{route}"')
    values = re.findall(rf"^{name}.*{label}.* (.+)$", service.metrics(), re.MULTILINE)
    return sum(float(value) for value in values)


def dependency_states(service: Service) -> dict[str, str]:
    """Return the status of each dependency, from the readiness probe."""
    checks = service.get("/health/ready").json()["checks"]
    return {name: check["status"] for name, check in checks.items()}


def lines_of_request(service: Service, request_id: str) -> list[dict[str, Any]]:
    """Return the log lines with this request ID."""
    return [line for line in service.lines if line.get("request_id") == request_id]


def metrics_directories(pid: int) -> list[Path]:
    """Return the metrics directories that a master has created itself."""
    return list(SHARED_MEMORY.glob(f"metrics-{pid}-*"))


def started_workers(service: Service) -> set[int]:
    """Return the pids of all workers that have started."""
    started = "Started server process"
    return {line["pid"] for line in service.lines if line["message"].startswith(started)}


# Requests


def test_responses_have_a_request_id_and_no_server_header(service: Service) -> None:
    response = service.get("/", **{"X-Request-ID": "from-outside"})
    assert response.json() == {"service": Settings().service_name, "version": "0.0.0"}
    assert response.headers["x-request-id"] == "from-outside"
    assert "server" not in response.headers


def test_container_health_check_succeeds_only_on_200(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIND", f"0.0.0.0:{service.port}")
    assert healthcheck.check()
    assert not healthcheck.check("/absent")
    # A port without a listener
    monkeypatch.setenv("BIND", "")
    monkeypatch.setenv("PORT", str(free_port()))
    assert not healthcheck.check()


def test_requests_to_all_workers_are_counted_and_logged(service: Service) -> None:
    """No other test uses this route: requests of others may be counted only now."""

    requests = 0

    def request(_: int) -> httpx.Response:
        return service.get("/slow?seconds=0", **{"X-Request-ID": "many"})

    def both_workers_respond() -> bool:
        nonlocal requests
        requests += 300
        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            responses = list(pool.map(request, range(300)))
        assert {response.status_code for response in responses} == {200}
        eventually(lambda: len(lines_of_request(service, "many")) == requests)
        return len({line["pid"] for line in lines_of_request(service, "many")}) == 2

    # On a busy machine one worker may accept all connections of a moment.
    eventually(both_workers_respond)
    eventually(lambda: count(service, "/slow") == requests)
    assert "http_server_active_requests 0.0" in service.metrics()


def test_unhandled_exception_is_a_500_and_one_log_line(service: Service) -> None:
    """The log line has the traceback; the response reveals nothing of it."""
    response = service.get("/bug", **{"X-Request-ID": "bug-1"})
    assert response.status_code == 500
    assert response.json()["request_id"] == "bug-1"
    assert "41111111" not in response.text
    # The access line follows the response.
    eventually(lambda: len(lines_of_request(service, "bug-1")) == 2)
    error, access = lines_of_request(service, "bug-1")
    assert (error["logger"], error["level"]) == ("app.observe", "error")
    assert (access["logger"], access["level"]) == ("access", "info")
    assert error["exception"]["type"] == "RuntimeError"
    assert "in bug" in error["exception"]["traceback"]


def test_incomplete_response_closes_the_connection(service: Service) -> None:
    """So the client notices that the response is incomplete."""
    with pytest.raises(httpx.RemoteProtocolError):
        service.get("/broken-stream")


@pytest.mark.parametrize("forged", ['a"b', "x" * 8000, "a b"])
def test_forged_request_ids_appear_nowhere(service: Service, forged: str) -> None:
    response = service.get("/nowhere", **{"X-Request-ID": forged})
    generated = response.headers["x-request-id"]
    assert forged not in response.text + generated
    eventually(lambda: lines_of_request(service, generated))
    assert forged not in str(service.lines)


def test_root_path_prefixes_urls_in_responses(urls: dict[str, str]) -> None:
    with serving(ROOT_PATH="/api", DOCS_ENABLED="true", **urls) as service:
        service.wait()
        assert service.get("/openapi.json").json()["servers"] == [{"url": "/api"}]
        payment = {"amount": 1, "currency": "EUR", "reference": "a"}  # example
        headers = {"Idempotency-Key": "a"}  # example
        created = service.http.post("/payments", json=payment, headers=headers)  # example
        assert created.headers["location"].startswith("/api/payments/")  # example


# Metrics


def test_killed_worker_is_replaced_and_its_metrics_are_kept(service: Service) -> None:
    """No other test uses this route."""
    for _ in range(20):
        service.get("/events?seconds=0", **{"X-Request-ID": "few"})
    eventually(lambda: count(service, "/events") == 20)
    eventually(lambda: lines_of_request(service, "few"))
    victim = lines_of_request(service, "few")[-1]["pid"]
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: f"Worker (pid:{victim}) was sent SIGKILL" in service.text)
    service.wait_for_workers(3)
    assert count(service, "/events") == 20


def test_corrupt_metrics_file_does_not_stop_the_master(
    urls: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("metrics")
    with serving(PROMETHEUS_MULTIPROC_DIR=str(directory), **urls) as service:
        service.wait()
        service.get("/")
        eventually(lambda: list(directory.glob("histogram_*.db")))
        # Of one worker; the other may have a file too.
        corrupt = next(directory.glob("histogram_*.db"))
        worker = psutil.Process(int(corrupt.stem.split("_")[1]))
        # Otherwise it would write the number of used bytes again.
        worker.suspend()
        with corrupt.open("r+b") as file:
            file.write(b"\xff\xff\xff\x7f")  # the number of used bytes
        response = scrape(service)
        assert response.status_code == 500
        assert "scrape failed" in response.text
        worker.kill()
        eventually(lambda: corrupt.name in error_messages(service))
        assert "scrape failed" in error_messages(service)
        service.wait()
        assert scrape(service).status_code == 200, service.text


def scrape(service: Service) -> httpx.Response:
    return service.http.get(f"http://127.0.0.1:{service.metrics_port}/metrics")


def error_messages(service: Service) -> str:
    return "\n".join(line["message"] for line in service.lines if line["level"] == "error")


def test_killed_metrics_process_is_replaced(service: Service) -> None:
    before = count(service, "/health/live")
    workers = started_workers(service)
    children = psutil.Process(service.process.pid).children()
    (victim,) = (child for child in children if child.pid not in workers)
    victim.kill()
    eventually(lambda: not victim.is_running())
    eventually(lambda: count(service, "/health/live") == before)


def test_metrics_address_serves_nothing_but_metrics(service: Service) -> None:
    address = f"http://127.0.0.1:{service.metrics_port}"
    assert service.http.get(f"{address}/metrics").status_code == 200
    assert service.http.get(f"{address}/").status_code == 404
    assert service.http.get(f"{address}/docs").status_code == 404


# Start


def test_passwords_are_not_logged(service: Service, urls: dict[str, str]) -> None:
    password = urls["DATABASE_URL"].split(":")[2].split("@")[0]
    assert password not in service.text


def test_start_logs_workers_and_connections(service: Service) -> None:
    (line,) = [line for line in service.lines if line["logger"] == "app.sizing"]
    sizes = "2 workers with 8 database connections each"
    assert line["message"].startswith(f"{sizes}: WEB_CONCURRENCY=2")


def test_failed_start_leaves_no_files(urls: dict[str, str]) -> None:
    unusable = {"BIND": "192.0.2.1:80", "METRICS_BIND": f"127.0.0.1:{free_port()}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "gunicorn"],
        cwd=PROJECT,
        env=os.environ | urls | unusable,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert process.wait(60) == 1
    assert metrics_directories(process.pid) == []


def test_metrics_address_in_use_is_one_clear_line(service: Service, urls: dict[str, str]) -> None:
    address = f"127.0.0.1:{service.metrics_port}"
    expected = f"configuration error: METRICS_BIND={address}: cannot listen there: "
    assert failed_start(METRICS_BIND=address, **urls) == expected


def test_metrics_directory_in_use_is_one_clear_line(
    urls: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = str(tmp_path_factory.mktemp("metrics"))
    setting = f"PROMETHEUS_MULTIPROC_DIR={directory}"
    problem = "another instance uses it; set another directory"
    with serving(PROMETHEUS_MULTIPROC_DIR=directory, **urls) as service:
        service.wait()
        line = failed_start(PROMETHEUS_MULTIPROC_DIR=directory, **urls)
        assert line.startswith(f"configuration error: {setting}: {problem}")


def failed_start(**settings: str) -> str:
    """Return the line on stderr of a failed start, without the kernel's own message."""
    addresses = {"BIND": f"127.0.0.1:{free_port()}", "METRICS_BIND": f"127.0.0.1:{free_port()}"}
    done = subprocess.run(
        [sys.executable, "-m", "gunicorn"],
        cwd=PROJECT,
        env=os.environ | addresses | settings,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    line = done.stderr.decode()
    assert line.count("\n") == 1
    return re.sub(r"Address.*\n", "", line)


# Signals


def test_sigterm_lets_requests_finish_and_exits_cleanly(urls: dict[str, str]) -> None:
    with serving(FAULT_ROUTES, RETIRE_SECONDS="0", **urls) as service:
        service.wait()
        service.wait_for_workers()
        address = ("127.0.0.1", service.port)
        with socket.create_connection(address, timeout=DEADLINE_SECONDS) as slow:
            slow.sendall(b"POST /length HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n")
            eventually(lambda: "http_server_active_requests 1.0" in service.metrics())
            service.process.send_signal(signal.SIGTERM)
            eventually(lambda: "Waiting for connections to close" in service.text)
            slow.sendall(b"abc")
            response = slow.recv(4096)
            assert response[:12] == b"HTTP/1.1 200"
            assert response[-1:] == b"3"
            assert service.process.wait(DEADLINE_SECONDS) == 0
        assert service.messages.count("Application shutdown complete.") == 2
        assert service.messages.count("atexit ran") >= 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_sigint_and_sigquit_do_not_wait_for_requests(urls: dict[str, str], number: int) -> None:
    with serving(FAULT_ROUTES, RETIRE_SECONDS="20", **urls) as service:
        service.wait()
        service.wait_for_workers()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            pool.submit(service.get, "/slow?seconds=30")
            eventually(lambda: "http_server_active_requests 1.0" in service.metrics())
            start = time.monotonic()
            assert service.stop(number) == 0
            # 2 s on an idle machine; 20 s if the workers retired.
            assert time.monotonic() - start < 10
        assert service.messages.count("Application shutdown complete.") == 2


def test_shutdown_leaves_no_processes_and_no_files(urls: dict[str, str]) -> None:
    with serving(**urls) as service:
        service.wait()
        master = psutil.Process(service.process.pid)
        # Two workers and the metrics process
        eventually(lambda: len(master.children()) == 3)
        children = master.children()
        assert service.stop() == 0
        _, alive = psutil.wait_procs(children, DEADLINE_SECONDS)
        assert alive == []
        assert metrics_directories(service.process.pid) == []


def test_all_processes_exit_when_the_master_is_killed(urls: dict[str, str]) -> None:
    with serving(**urls) as service:
        service.wait()
        children = psutil.Process(service.process.pid).children(recursive=True)
        service.process.kill()
        service.process.wait()
        _, alive = psutil.wait_procs(children, DEADLINE_SECONDS)
        for process in alive:
            process.kill()
        assert alive == []
    for directory in metrics_directories(service.process.pid):
        # A service that runs may delete it now.
        shutil.rmtree(directory, ignore_errors=True)


def test_sighup_replaces_workers_without_reloading_settings(
    urls: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    secrets = tmp_path_factory.mktemp("secrets")
    with serving(SECRETS_DIR=str(secrets), **PATIENT, **urls) as service:
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
        # The metrics process is not replaced.
        assert len(after & before) == 1
        assert count(service, "/") == 10
        assert {line["level"] for line in service.lines} == {"info"}


def test_sigusr2_is_ignored_with_a_log_line(service: Service) -> None:
    service.process.send_signal(signal.SIGUSR2)
    eventually(lambda: "SIGUSR2 is ignored" in service.text)
    assert service.get("/").status_code == 200


# Outages


def test_service_is_live_without_dependencies_and_recovers(redis: Redis) -> None:
    with postgres() as server:
        server.stop()
        urls = {"DATABASE_URL": server.url, "REDIS_URL": f"redis://127.0.0.1:{free_port()}"}
        with serving(**PATIENT, **urls) as service:
            service.wait("/health/startup")
            assert service.get("/health/live").status_code == 200
            ready = service.get("/health/ready")
            assert (ready.status_code, ready.json()["status"]) == (503, "not_ready")
            assert {check["status"] for check in ready.json()["checks"].values()} == {"unhealthy"}
            server.start()
            # The workers notice it up to a second apart.
            recovered = {"postgres": "healthy", "redis": "unhealthy"}
            eventually(lambda: dependency_states(service) == recovered)
            # One line for each worker, not one for each attempt.
            assert 1 <= len(health_lines(service, "postgres unavailable")) <= 2
            assert 1 <= len(health_lines(service, "redis unavailable")) <= 2


def health_lines(service: Service, start: str) -> list[str]:
    lines = [line["message"] for line in service.lines if line["logger"] == "app.health"]
    return [line for line in lines if line.startswith(start)]


def test_postgres_outage_affects_nothing_but_readiness(redis: Redis) -> None:
    """Whether Postgres hangs or stops."""
    with postgres() as server, serving(DATABASE_URL=server.url, REDIS_URL=redis.url) as service:
        service.wait()

        def check_other_probes() -> None:
            assert service.get("/health/live").status_code == 200
            assert service.get("/health/startup").status_code == 200

        with frozen(server.pid):
            service.wait("/health/ready", 503)
            check_other_probes()
        service.wait("/health/ready", 200)
        server.stop()
        service.wait("/health/ready", 503)
        check_other_probes()
        server.start()
        service.wait("/health/ready", 200)
        assert "Traceback" not in service.text


def test_hung_redis_is_reported_but_does_not_affect_readiness(
    urls: dict[str, str], redis: Redis
) -> None:
    with serving(**PATIENT, **urls) as service:
        service.wait()
        with frozen(redis.pid):
            eventually(lambda: dependency_states(service)["redis"] == "unhealthy")
            assert service.get("/health/ready").status_code == 200
        eventually(lambda: dependency_states(service)["redis"] == "healthy")
