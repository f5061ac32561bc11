"""The live view of `make watch`, without a browser: its numbers, its events, its limits."""

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from app.setting_types import HostPort
from app.settings import Settings
from scripts import dev_watch
from scripts.watch import lines, server
from scripts.watch.changes import Changes
from scripts.watch.exposition import Metrics
from scripts.watch.polling import MAX_SCRAPE_SECONDS, SCRAPE_SECONDS, Polling, pause_seconds
from scripts.watch.sample import quantile, sample
from scripts.watch.view import KEPT, View
from tests.service_process import PROJECT, eventually

DURATION = "http_server_request_duration_seconds"


def exposed(requests: int, *, prefix: str = "", route: str = "/orders", status: int = 200) -> str:
    """Return metrics with requests that lasted 10 to 20 ms, and a pool in use."""
    labels = f'http_route="{route}",http_response_status_code="{status}"'
    bucket = DURATION + '_bucket{le="%s",' + labels + "} %d"
    series = [
        bucket % ("0.01", 0),
        bucket % ("0.02", requests),
        bucket % ("+Inf", requests),
        DURATION + "_count{" + labels + "} " + str(requests),
        'db_client_connection_max{db_client_connection_pool_name="postgres"} 5',
        'dependency_up{dependency="postgres"} 1',
        'stream_messages_waiting{stream="s",state="unread"} NaN',
        'stream_messages_waiting{stream="s",state="pending"} 2',
        'outbox_backlog_events{table="outbox"} 3',
        'outbox_lag_seconds{table="outbox"} 1.5',
        'worker_resident_memory_bytes{pid="7"} 6.5e+07',
    ]
    kind = f"# TYPE {prefix}dependency_up gauge"
    return "\n".join([kind, *(prefix + each for each in series)]) + "\n"


@pytest.mark.parametrize("prefix", ["", "acme_"])
def test_rates_and_quantiles_are_those_between_two_scrapes(prefix: str) -> None:
    before, now = (Metrics(exposed(number, prefix=prefix)) for number in (100, 140))
    found = sample(now, before, 2.0)
    assert found["rate"] == 20
    assert found["p50"] == pytest.approx(0.015)
    assert found["p99"] == pytest.approx(0.0199)
    assert found["pools"]["postgres"]["max"] == 5
    assert found["waiting"] == {"outbox": 3, "stream unread": None, "stream pending": 2}
    assert found["ages"] == {"outbox": 1.5}
    assert found["memory"] == {"7": 65.0}


def test_probes_are_no_requests_and_a_restarted_service_has_no_negative_rate() -> None:
    probes = Metrics(exposed(100, route="/health/ready"))
    assert sample(probes, Metrics(), 1.0)["rate"] == 0
    assert sample(probes, Metrics(), 1.0)["p99"] is None
    assert sample(Metrics(exposed(1)), Metrics(exposed(100)), 1.0)["rate"] == 0


@pytest.mark.parametrize(("status", "name"), [(500, "errors"), (404, "rejected")])
def test_errors_are_counted_by_their_class(status: int, name: str) -> None:
    found = sample(Metrics(exposed(8, status=status)), Metrics(exposed(0, status=status)), 2.0)
    assert found[name] == 4


def test_quantile_above_the_last_bucket_is_its_bound() -> None:
    """As in PromQL."""
    assert quantile({0.1: 0, 1.0: 0, float("inf"): 5}, 0.5) == 1.0


def test_another_text_than_metrics_is_an_empty_sample() -> None:
    found = sample(Metrics("<html>\nnot found 1\n"), Metrics(), 1.0)
    assert found["workers"] is None
    assert found["pools"] == {}


def observed(**changed: Any) -> dict[str, Any]:
    pool = {"used": 1, "max": 2, "waiting": 0}
    exits = {"recycled": 0, "crashed": 0}
    names = {"memory": {"7": 60}, "exits": exits, "dependencies": {"redis": 1}, "timeouts": 0}
    return {**names, "pools": {"postgres": pool}} | changed


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"exits": {"recycled": 1, "crashed": 0}}, "a worker was recycled after MAX_REQUESTS"),
        ({"exits": {"recycled": 0, "crashed": 1}}, "a worker crashed, or was killed"),
        ({"memory": {"7": 60, "8": 50}}, "worker 8 serves"),
        ({"memory": {}}, "worker 7 has ended"),
        ({"dependencies": {"redis": 0}}, "redis is unavailable"),
        ({"timeouts": 3}, "callers get no connection in time"),
        (
            {"pools": {"postgres": {"used": 2, "max": 2, "waiting": 4}}},
            "the pool of postgres is exhausted: 2 of 2 in use, 4 wait",
        ),
    ],
)
def test_change_is_one_event(changed: dict[str, Any], text: str) -> None:
    changes = Changes()
    assert changes.of_sample(observed()) == []
    assert [event["text"] for event in changes.of_sample(observed(**changed))] == [text]
    assert changes.of_sample(observed(**changed)) == []


def test_each_state_of_the_probe_is_one_event() -> None:
    changes = Changes()
    texts = []
    for state, failed in [
        ("ready", []),
        ("ready", []),
        ("waiting", []),
        ("not_ready", ["postgres"]),
        ("not_ready", ["postgres"]),
        ("ready", []),
        ("draining", ["redis"]),
        ("down", []),
    ]:
        texts += [event["text"] for event in changes.of_probe({"state": state, "failed": failed})]
    assert texts == [
        "the readiness probe gets no response yet",
        "not ready: postgres",
        "ready",
        "draining: balancers send no new requests",
        "nothing listens",
    ]


def test_large_service_is_scraped_less_often() -> None:
    """A scrape costs CPU for each worker and series."""
    text = 'worker_processes 16\ncgroup_cpu_limit 2\nx{a="b"} 1\n'
    assert pause_seconds(Metrics(text)) == SCRAPE_SECONDS
    assert SCRAPE_SECONDS < pause_seconds(Metrics(text + "# filler\n" * 1_000)) < 10
    assert pause_seconds(Metrics(text + "# filler\n" * 1_000_000)) == MAX_SCRAPE_SECONDS


def test_service_that_does_not_run_is_shown_as_such() -> None:
    view = View()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        polling = Polling(view, url, [f"{url}/metrics"])
        polling.probe()
        polling.scrape()
    entries = [json.loads(text) for text in view.after(0, 0)[1]]
    assert [entry["kind"] for entry in entries] == ["setup", "probe", "event", "sample"]
    assert entries[1]["state"] == "down"
    assert entries[3]["is_reachable"] is False


def test_history_is_bounded_and_in_order() -> None:
    view = View()
    for number in range(KEPT["sample"] * 3):
        view.add("sample", [{"number": number}])
        view.add("line", [{"number": number}])
    last, entries = view.after(0, 0)
    assert len(entries) == KEPT["sample"] + KEPT["line"]
    numbers = [json.loads(text)["number"] for text in entries]
    assert numbers == sorted(numbers)
    assert view.after(last, 0) == (last, [])
    # A page of an earlier run
    assert len(view.after(last + 10, 0)[1]) == len(entries)


def shown(*written: bytes) -> list[dict[str, Any]]:
    view = View()
    reader = lines.Lines(view, io.BytesIO(b"".join(written)))
    reader.start()
    eventually(lambda: view.number)
    return [json.loads(text) for text in view.after(0, 0)[1]]


def test_lines_are_shown_with_their_request_id() -> None:
    access = {"logger": "access", "method": "GET", "path": "/a", "status": 200, "duration_ms": 1.5}
    error = {"logger": "app.observe", "level": "error", "message": "bug", "request_id": "r2"}
    found = shown(
        json.dumps(access | {"message": "request", "request_id": "r1"}).encode() + b"\n",
        json.dumps(error).encode() + b"\n",
        b"no json \xff\n",
    )
    by_id = {entry.get("request_id"): entry["message"] for entry in found}
    assert by_id == {"r1": "GET /a 200 1.5 ms", "r2": "bug", None: "no json \ufffd"}


def test_flood_of_access_lines_pushes_out_no_other_line() -> None:
    access = b'{"logger":"access","message":"request"}\n'
    found = shown(b'{"logger":"app","level":"error","message":"rare"}\n', access * 100_000)
    assert len(found) <= 2 * lines.MAX_SHOWN
    assert "rare" in [entry["message"] for entry in found]


@pytest.fixture
def page() -> Iterator[tuple[View, str]]:
    view = View()
    running = server.open_server(view, HostPort("127.0.0.1:0"))
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield view, f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    thread.join()
    running.server_close()


def test_events_begin_with_the_history_or_after_the_last_one(page: tuple[View, str]) -> None:
    view, url = page
    view.add("event", [{"text": "first"}, {"text": "second"}])
    for last, texts in (("", ["first", "second"]), ("1", ["second"])):
        headers = {"Last-Event-ID": last}
        with httpx.stream("GET", f"{url}/events", headers=headers) as response:
            received = response.iter_lines()
            assert next(received) == "id: 2"
            entries = json.loads(next(received).removeprefix("data: "))
        assert [entry["text"] for entry in entries] == texts


def test_page_is_for_this_machine_only_and_loads_nothing_else(page: tuple[View, str]) -> None:
    """A name of an attacker that is rebound to 127.0.0.1 would read the lines."""
    _, url = page
    assert httpx.get(url, headers={"Host": "attacker.example:8900"}).status_code == 403
    assert httpx.get(f"{url}/other").status_code == 404
    assert httpx.post(url).status_code == 501
    assert "default-src 'none'" in httpx.get(url).headers["Content-Security-Policy"]
    text = server.PAGE.read_text()
    for forbidden in ("innerHTML", "http:", "https:", "src="):
        assert forbidden not in text


def test_make_dev_shows_its_other_processes(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(
        database_url=SecretStr("postgresql://a@127.0.0.1/a"),
        redis_url=SecretStr("redis://127.0.0.1"),
    )
    monkeypatch.setattr(dev_watch, "others", ["127.0.0.1:9"])
    monkeypatch.setenv("WATCH", "1")
    printed = ""
    with dev_watch.watching(settings):
        end = time.monotonic() + 30
        while "http" not in printed and time.monotonic() < end:
            time.sleep(0.05)
            printed += capfd.readouterr().out
        url = printed.split()[printed.split().index("watch") + 1]
        with httpx.stream("GET", f"{url}events") as response:
            received = response.iter_lines()
            next(received)
            setup, *_ = json.loads(next(received).removeprefix("data: "))
    assert setup["service"] == f"http://{settings.bind}"
    assert setup["metrics"][1:] == ["http://127.0.0.1:9/metrics"]


@pytest.mark.parametrize(
    ("name", "value"), [("SERVICE", "localhost:8000"), ("METRICS", "ftp://a"), ("WATCH_PORT", "0")]
)
def test_invalid_variable_is_one_line(name: str, value: str) -> None:
    command = [sys.executable, "-m", "scripts.watch"]
    environment = os.environ | {name: value}
    done = subprocess.run(
        command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"{name}={value}: must be ")
    assert done.stderr.count("\n") == 1
