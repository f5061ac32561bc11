"""Every panel of the service's dashboard shows what happens.

A real Prometheus scrapes the service and nginx, in front of it. Each fault that a panel is for
happens during the test. Nothing here needs the example: tests/test_panels.py of the template runs
this file on a project without it too.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from scripts.dev_services import free_port
from tests.service_process import Service, eventually, serving

from alerting import NAME, Watch, queries_of, running, watching
from control_group import ControlGroup, control_group
from load import get, load
from prerequisites import program
from proxies import proxy
from test_faults import workers

#: Of nginx. Each request needs two, so the good ones leave some.
CONNECTIONS = 64
THROTTLING = "CPU throttling, A"
#: No log line is lost here, as test_abuse.py has it, and no worker is missing for long.
MAY_BE_ZERO = {
    "Dropped log lines and traces, A",
    "Dropped log lines and traces, B",
    "Missing workers, A",
}
PROXIED = 4 * [get("/", statuses=(200, 503), pause=0.05)]
#: More than may be in flight. Those that are wait for the few connections to Postgres, some too
#: long, or miss the objective for latency.
TOO_MANY = 16 * [get("/sleep?seconds=0.8", statuses=(200, 503), pause=0.1)]
BUGS = 2 * [get("/bug", statuses=(500, 503), pause=0.2)]
PANEL_SECONDS = 90
THROTTLED_SECONDS = 2


@pytest.fixture(scope="module")
def group() -> Iterator[ControlGroup | None]:
    with control_group() as group:
        yield group


@pytest.fixture(scope="module")
def service(urls: dict[str, str], group: ControlGroup | None) -> Iterator[Service]:
    settings = urls | {
        "WEB_CONCURRENCY": "2",
        "MAX_IN_FLIGHT": "6",
        "DATABASE_MAX_CONNECTIONS": "6",
        "DATABASE_ACQUIRE_TIMEOUT_SECONDS": "0.5",
        # Nothing listens there.
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}",
        "OTEL_BSP_SCHEDULE_DELAY": "1000",
    }
    prefix = group.prefix if group else ()
    with serving("dependency_routes:app", 0, None, prefix, **settings) as service:
        service.wait()
        service.wait_for_workers()
        yield service


@pytest.fixture(scope="module")
def nginx_port(service: Service) -> Iterator[int]:
    port = free_port()
    with proxy("nginx", port, (service.port, service.port), CONNECTIONS):
        yield port


@pytest.fixture(scope="module")
def watch(
    service: Service, nginx_port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watch]:
    directory = tmp_path_factory.mktemp("prometheus")
    port = free_port()
    exporter = (
        program("prometheus-nginx-exporter"),
        f"--nginx.scrape-uri=http://127.0.0.1:{nginx_port}/stub_status",
        f"--web.listen-address=127.0.0.1:{port}",
    )
    targets = {NAME: service.metrics_port, "nginx": port}
    with running(*exporter, log=directory / "exporter.log"), watching(directory, targets) as watch:
        yield watch


@contextlib.contextmanager
def flooding(port: int) -> Iterator[None]:
    """Open more connections than nginx has, again and again, during the block.

    Each sends the beginning of a request: nginx closes connections that are idle in favor of new
    ones. In between, nginx responds to its exporter.
    """
    stop = threading.Event()

    def flood() -> None:
        while not stop.wait(1):
            with contextlib.ExitStack() as stack:
                for _ in range(2 * CONNECTIONS):
                    client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                    # It may be closed already: that is what this is for.
                    with contextlib.suppress(OSError):
                        client.send(b"GET / HTTP/1.1\r\n")
                stop.wait(0.2)

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def everything_happening(service: Service, nginx_port: int) -> Iterator[None]:
    """Send good requests, too many, those that meet a bug; kill a worker."""
    with load(nginx_port, PROXIED), load(service.port, TOO_MANY, BUGS), flooding(nginx_port):
        workers(service)[0].kill()
        yield


def test_every_panel_shows_what_happens(watch: Watch, service: Service, nginx_port: int) -> None:
    """Each query finds a value, and one that is not 0, at some time during the faults."""
    waiting = queries_of("service")
    # The next test has it.
    waiting.pop(THROTTLING)

    # Only what happens after the first scrape is an increase.
    eventually(lambda: watch.query("worker_exits_total"), PANEL_SECONDS)

    def has_data(name: str, query: str) -> bool:
        values = watch.values(query)
        return any(values) or (values != [] and name in MAY_BE_ZERO)

    def all_have_data() -> bool:
        for name, query in list(waiting.items()):
            if has_data(name, query):
                del waiting[name]
        return not waiting

    with everything_happening(service, nginx_port), contextlib.suppress(AssertionError):
        eventually(all_have_data, PANEL_SECONDS)
    assert waiting == {}


def test_cpu_limit_shows_in_the_panel_of_throttling(
    watch: Watch, service: Service, group: ControlGroup | None
) -> None:
    """Not for longer than a worker may hang, and the scrapes after it have the time to succeed."""
    if group is None:
        pytest.skip("a control group needs root and a writable /sys/fs/cgroup")
    query = queries_of("service")[THROTTLING]
    with load(service.port, 8 * [get("/", statuses=(200, 503))]), group.limited(cpus=0.2):
        time.sleep(THROTTLED_SECONDS)
    eventually(lambda: any(watch.values(query)), PANEL_SECONDS)
