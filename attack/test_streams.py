"""What lasts longer than the process that serves it: how it ends with a drain, an interrupt, a stuck loop."""

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from tests.process import Service, eventually, serving
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from load import get, load
from watch import workers

APP = "streams:app"
CLOSE_FRAME = b"\x88\x82\0\0\0\0\x03\xe8"  # masked, as a client's; code 1000
WAITING = "Waiting for background tasks to complete. (CTRL+C to force quit)"
CANCELLED = "Cancel 1 running task(s), timeout graceful shutdown exceeded"
DRAIN_SECONDS, RETIRE_SECONDS = 2.0, 1.0
TIMES = {"DRAIN_SECONDS": str(DRAIN_SECONDS), "RETIRE_SECONDS": str(RETIRE_SECONDS)}


def messages(service: Service, logger: str) -> list[str]:
    """Return what a logger has said."""
    return [line["message"] for line in service.lines if line["logger"] == logger]


@contextlib.contextmanager
def started(urls: dict[str, str], **settings: str) -> Iterator[Service]:
    """Run the service with its streams until both workers serve."""
    with serving(APP, **settings, **urls) as service:
        service.wait()
        eventually(lambda: len(workers(service)) == 2)
        yield service


def assert_clean_end(service: Service) -> None:
    """Hold that both workers have closed what they held."""
    assert messages(service, "uvicorn.error").count("Application shutdown complete.") == 2
    assert "Traceback" not in service.text


def echo(port: int) -> ClientConnection:
    """Open a WebSocket that works."""
    client = connect(f"ws://127.0.0.1:{port}/echo")
    client.send("before")
    assert client.recv(5) == "before"
    return client


class Reading:
    """A stream that is read in a thread of its own, at `pause_seconds` a part, until it ends in one way or another."""

    def __init__(self, port: int, path: str, pause_seconds: float) -> None:
        self.size, self.end = 0, ""
        self.connection = socket.create_connection(("127.0.0.1", port), 60)
        self.connection.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        self.pause_seconds = pause_seconds
        self.thread = threading.Thread(target=self._read)
        self.thread.start()
        eventually(lambda: self.size > 100)

    def _read(self) -> None:
        with self.connection:
            try:
                while data := self.connection.recv(65_536):
                    self.size += len(data)
                    time.sleep(self.pause_seconds)
                self.end = "closed"
            except ConnectionResetError:
                self.end = "reset"
        self.ended_at = time.monotonic()


def test_a_websocket_lives_through_the_drain_and_closes_with_1012(urls: dict[str, str]) -> None:
    with started(urls, **TIMES) as service, echo(service.port) as client:
        service.process.send_signal(signal.SIGTERM)
        time.sleep(DRAIN_SECONDS / 2)
        client.send("during")
        assert client.recv(5) == "during"
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(20)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012
        assert service.process.wait(20) == 0
        assert_clean_end(service)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("last_words", [b"", CLOSE_FRAME])
def test_a_websocket_that_is_not_read_holds_nothing_up(urls: dict[str, str], number: int, last_words: bytes) -> None:
    with started(urls, **TIMES) as service:
        with connect(f"ws://127.0.0.1:{service.port}/flood", compression=None, close_timeout=1) as client:
            time.sleep(0.5)
            client.socket.sendall(last_words)
            time.sleep(0.5)
            start = time.monotonic()
            assert service.stop(number) == 0
            seconds = time.monotonic() - start
        print(f"ended after {seconds:.1f} s")
        assert seconds < (DRAIN_SECONDS + RETIRE_SECONDS if number == signal.SIGTERM else 0) + 3
        assert_clean_end(service)


def test_streams_end_after_the_time_to_retire(urls: dict[str, str]) -> None:
    with started(urls, **TIMES) as service:
        readings = [
            Reading(service.port, "/events?seconds=120", 0),
            Reading(service.port, "/download", 0.05),  # would take two minutes
        ]
        start = time.monotonic()
        assert service.stop() == 0
        for reading in readings:
            reading.thread.join(20)
            seconds = reading.ended_at - start
            print(f"a stream ended {seconds:.1f} s after the signal: {reading.end}, {reading.size} bytes")
            assert seconds > DRAIN_SECONDS + RETIRE_SECONDS - 0.5
            assert seconds < 20
        assert_clean_end(service)


def start_work(service: Service, seconds: float) -> None:
    """Have work go on behind answers, in both ways that there are.

    FastAPI's belongs to a request, and ends first: the end waits for requests, then for the service's own background.
    """
    for path, longer in {"/background": 2, "/background-task": 0}.items():
        assert service.http.post(path, params={"seconds": seconds + longer}).status_code == 200


def test_work_behind_an_answer_is_waited_for(urls: dict[str, str]) -> None:
    with started(urls) as service:
        start_work(service, 3)
        assert service.stop() == 0
        assert messages(service, "streams") == 2 * ["the work is done"]
        assert messages(service, "uvicorn.error").count(WAITING) == 1
        own = ["waiting for 1 tasks in the background", "1 tasks finished, 0 cancelled"]
        assert messages(service, "app.background") == own
        assert {line["level"] for line in service.lines} == {"info"}
        assert_clean_end(service)


def test_work_that_lasts_too_long_is_cancelled_with_one_line_each(urls: dict[str, str]) -> None:
    with started(urls, GRACEFUL_TIMEOUT_SECONDS="5") as service:
        start_work(service, 60)
        assert service.stop() == 0
        assert messages(service, "streams") == 2 * ["the work was cancelled"]
        lines = [line["message"] for line in service.lines if line["level"] != "info"]
        assert sorted(lines) == ["0 tasks finished, 1 cancelled", CANCELLED]
        assert_clean_end(service)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_an_interrupt_ends_everything_within_two_seconds(urls: dict[str, str], number: int) -> None:
    with started(urls, **TIMES) as service, ThreadPoolExecutor() as pool, echo(service.port):
        readings = [Reading(service.port, "/events?seconds=120", 0), Reading(service.port, "/download", 0.05)]
        slow = pool.submit(service.get, "/slow?seconds=60")
        start_work(service, 60)
        time.sleep(0.5)
        start = time.monotonic()
        assert service.stop(number) == 0
        seconds = time.monotonic() - start
        print(f"ended after {seconds:.1f} s")
        assert seconds < 3
        for reading in readings:
            reading.thread.join(5)
            assert reading.end
        with contextlib.suppress(httpx.TransportError):
            assert slow.result().status_code == 503
        assert_clean_end(service)
        assert messages(service, "streams") == 2 * ["the work was cancelled"]


def test_a_second_term_changes_nothing(urls: dict[str, str]) -> None:
    with started(urls, **TIMES) as service:
        with load(service.port, [get("/", "GET")], 4 * [get("/slow?seconds=4", "GET of 4 s")]) as result:
            time.sleep(0.5)
            start = time.monotonic()
            for _ in range(4):  # a group's signal reaches master and workers
                for process in [psutil.Process(service.process.pid), *map(psutil.Process, workers(service))]:
                    process.send_signal(signal.SIGTERM)
                time.sleep(0.2)
                assert service.get("/health/ready").json()["status"] == "draining"
            assert service.process.wait(20) == 0
            assert time.monotonic() - start > DRAIN_SECONDS
        print(result)
        assert {reason for _, _, reason in result.failures} == {"refused"}  # after its end
        assert result.answered["GET of 4 s", 200] == 4
        assert {line["level"] for line in service.lines} == {"info"}


def test_usr2_is_one_line_and_nothing_else(urls: dict[str, str]) -> None:
    with started(urls) as service:
        family = {process.pid for process in psutil.Process(service.process.pid).children(recursive=True)}
        lines = len(service.lines)
        service.process.send_signal(signal.SIGUSR2)
        eventually(lambda: len(service.lines) > lines)
        time.sleep(2)
        said = [line["message"] for line in service.lines[lines:]]
        assert said == ["Handling signal: usr2", "SIGUSR2 is ignored: start a new instance instead"]
        assert {process.pid for process in psutil.Process(service.process.pid).children(recursive=True)} == family
        assert service.get("/").status_code == 200


@pytest.mark.parametrize("path", ["/asleep", "/spinning"])
def test_a_stuck_worker_is_replaced_and_leaves_its_stack(urls: dict[str, str], path: str) -> None:
    with started(urls, WORKER_TIMEOUT_SECONDS="2") as service:
        old = workers(service)
        with pytest.raises(httpx.RemoteProtocolError):
            service.get(path)
        eventually(lambda: len(workers(service)) == 2 and workers(service) != old)
        (stuck,) = [line for line in service.lines if line["logger"] == "app.worker"]
        print(stuck["message"], stuck["stacks"].splitlines()[:4])
        assert f"in {path[1:]}" in stuck["stacks"]
        assert service.get("/").status_code == 200
