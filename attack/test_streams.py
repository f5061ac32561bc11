"""Shutdown with clients that read endless responses slowly, or do not read at all."""

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
#: A close frame with code 1000, masked as a client's frame must be.
CLOSE_FRAME = b"\x88\x82\0\0\0\0\x03\xe8"
DRAIN_SECONDS = 2.0
RETIRE_SECONDS = 1.0
TIMES = {"DRAIN_SECONDS": str(DRAIN_SECONDS), "RETIRE_SECONDS": str(RETIRE_SECONDS)}


def messages(service: Service, logger: str) -> list[str]:
    """Return the messages of a logger."""
    return [line["message"] for line in service.lines if line["logger"] == logger]


@contextlib.contextmanager
def started(urls: dict[str, str], **settings: str) -> Iterator[Service]:
    """Run the service with its streams; the block begins when both workers serve."""
    with serving(APP, **settings, **urls) as service:
        service.wait()
        eventually(lambda: len(workers(service)) == 2)
        yield service


def assert_clean_shutdown(service: Service) -> None:
    """Assert that the lifespan of both workers has ended, without a traceback."""
    assert messages(service, "uvicorn.error").count("Application shutdown complete.") == 2
    assert "Traceback" not in service.text


class StreamReader:
    """Reads a stream in a thread until it ends, with a pause after each chunk."""

    def __init__(self, port: int, path: str, pause_seconds: float) -> None:
        self.size = 0
        #: How the stream ended: "closed" or "reset".
        self.end = ""
        self.pause_seconds = pause_seconds
        self.connection = socket.create_connection(("127.0.0.1", port), 60)
        self.connection.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
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


@pytest.mark.parametrize(
    ("number", "longest_seconds"),
    [(signal.SIGTERM, DRAIN_SECONDS + RETIRE_SECONDS + 3), (signal.SIGINT, 3)],
    ids=["SIGTERM", "SIGINT"],
)
@pytest.mark.parametrize("last_frame", [b"", CLOSE_FRAME], ids=["silent", "closing"])
def test_unread_websocket_does_not_delay_shutdown(
    urls: dict[str, str], number: int, longest_seconds: float, last_frame: bytes
) -> None:
    with started(urls, **TIMES) as service:
        url = f"ws://127.0.0.1:{service.port}/flood"
        with connect(url, compression=None, close_timeout=1) as client:
            time.sleep(0.5)
            client.socket.sendall(last_frame)
            time.sleep(0.5)
            begin = time.monotonic()
            assert service.stop(number) == 0
            seconds = time.monotonic() - begin
        print(f"ended after {seconds:.1f} s")
        assert seconds < longest_seconds
        assert_clean_shutdown(service)


def test_streams_end_after_drain_and_retire_seconds(urls: dict[str, str]) -> None:
    """Without shutdown, either stream would last two minutes."""
    with started(urls, **TIMES) as service:
        readers = [
            StreamReader(service.port, "/events?seconds=120", 0),
            StreamReader(service.port, "/download", 0.05),
        ]
        begin = time.monotonic()
        assert service.stop() == 0
        for reader in readers:
            reader.thread.join(20)
            seconds = reader.ended_at - begin
            end = f"{reader.end}, {reader.size} bytes"
            print(f"a stream ended {seconds:.1f} s after the signal: {end}")
            assert seconds > DRAIN_SECONDS + RETIRE_SECONDS - 0.5
            assert seconds < 20
        assert_clean_shutdown(service)


def test_repeated_sigterm_does_not_shorten_the_drain(urls: dict[str, str]) -> None:
    """A signal to the process group reaches the master and all workers."""
    # Longer than the repeated signals last, and shorter than the requests in flight.
    drain_seconds = 6.0
    in_flight = get("/slow?seconds=8", "GET of 8 s")
    with started(urls, DRAIN_SECONDS=str(drain_seconds), RETIRE_SECONDS="1") as service:
        with load(service.port, [get("/", "GET")], 4 * [in_flight]) as result:
            time.sleep(0.5)
            begin = time.monotonic()
            for _ in range(4):
                for pid in (service.process.pid, *workers(service)):
                    psutil.Process(pid).send_signal(signal.SIGTERM)
                time.sleep(0.2)
                assert service.get("/health/ready").json()["status"] == "draining"
            assert service.process.wait(20) == 0
            assert time.monotonic() - begin > drain_seconds
        print(result)
        # The service refuses connections only after it has ended.
        assert {failure.reason for failure in result.failures} == {"refused"}
        assert result.responses["GET of 8 s", 200] == 4
        assert {line["level"] for line in service.lines} == {"info"}
