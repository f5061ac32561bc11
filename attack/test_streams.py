"""Clients that take what a service that ends would send for ever, slowly or not at all."""

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
from tests.service_process import Service, eventually, serving
from websockets.sync.client import connect

from load import get, load
from watch import workers

APP = "streams:app"
CLOSE_FRAME = b"\x88\x82\0\0\0\0\x03\xe8"  # masked, as a client's; code 1000
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("last_words", [b"", CLOSE_FRAME], ids=["silent", "closing"])
def test_a_websocket_that_is_not_read_holds_nothing_up(
    urls: dict[str, str], number: int, last_words: bytes
) -> None:
    with started(urls, **TIMES) as service:
        with connect(
            f"ws://127.0.0.1:{service.port}/flood", compression=None, close_timeout=1
        ) as client:
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
            print(
                f"a stream ended {seconds:.1f} s after the signal: {reading.end}, {reading.size} bytes"
            )
            assert seconds > DRAIN_SECONDS + RETIRE_SECONDS - 0.5
            assert seconds < 20
        assert_clean_end(service)


def test_a_second_term_changes_nothing(urls: dict[str, str]) -> None:
    drain_seconds = (
        6.0  # longer than all that is asked meanwhile, and shorter than what is under way
    )
    with started(urls, DRAIN_SECONDS=str(drain_seconds), RETIRE_SECONDS="1") as service:
        with load(
            service.port, [get("/", "GET")], 4 * [get("/slow?seconds=8", "GET of 8 s")]
        ) as result:
            time.sleep(0.5)
            start = time.monotonic()
            for _ in range(4):  # a group's signal reaches master and workers
                for process in [
                    psutil.Process(service.process.pid),
                    *map(psutil.Process, workers(service)),
                ]:
                    process.send_signal(signal.SIGTERM)
                time.sleep(0.2)
                assert service.get("/health/ready").json()["status"] == "draining"
            assert service.process.wait(20) == 0
            assert time.monotonic() - start > drain_seconds
        print(result)
        assert {failure.reason for failure in result.failures} == {"refused"}  # after its end
        assert result.answered["GET of 8 s", 200] == 4
        assert {line["level"] for line in service.lines} == {"info"}
