"""Clients that send too much, too slowly or too many requests at once.

Other clients are served meanwhile, and memory stays bounded.
"""

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import httpx
import pytest
from tests.service_process import Service, eventually, frozen, serving

from load import MIXED, get, load
from watch import counted, every, resident_bytes, workers

APP = "tests.fault_routes:app"
MEGABYTE = 1 << 20
CHUNK = b"x" * 65_536
HEADER_LINES = b"\r\n".join(repeat(b"X-Attack: " + b"x" * 100, 500))
ATTACKERS = 4
SLOW_CLIENTS = 200
#: For headers and for bodies.
TIMEOUT_SECONDS = 2
#: Timeouts are checked once a second, on a busy machine; without ours, clients hold on for 10 s.
SLACK_SECONDS = 5
#: The limit for every other request, on a busy machine.
BUSY_SECONDS = 5


@pytest.fixture(scope="module")
def service(urls: dict[str, str]) -> Iterator[Service]:
    """One service for all attacks, warmed up."""
    timeouts = {
        "HEADER_TIMEOUT_SECONDS": str(TIMEOUT_SECONDS),
        "REQUEST_BODY_TIMEOUT_SECONDS": str(TIMEOUT_SECONDS),
    }
    with serving(APP, **timeouts, **urls) as service:
        service.wait()
        eventually(lambda: len(workers(service)) == 2)
        with load(service.port, MIXED):
            time.sleep(2)
        yield service


@contextlib.contextmanager
def bearing(service: Service) -> Iterator[None]:
    """Assert that memory is bounded, workers survive and other clients are served."""
    pids = workers(service)
    with (
        every(0.05, lambda: resident_bytes(pids)) as memory,
        load(service.port, 4 * [get("/", "GET")]) as others,
    ):
        yield
    peaks = {pid: max(sample.get(pid, 0) for sample in memory) for pid in pids}
    growth = {pid: (peaks[pid] - memory[0][pid]) / MEGABYTE for pid in pids}
    slowest = max(others.slowest_seconds.values())
    print(f"memory grew by {max(growth.values()):.1f} MB")
    print(f"others: {others}, the slowest {slowest:.2f} s")
    assert max(growth.values()) < 20, growth
    assert others.failures == [], str(others)
    assert others.total > 0
    assert slowest < BUSY_SECONDS
    assert workers(service) == pids


def flood(port: int, start: bytes, chunk: bytes, megabytes: int) -> bytes:
    """Send `start`, then chunks until the server closes; return its response.

    `megabytes` is the total size of the chunks.
    """
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(start)
            for _ in range(megabytes * MEGABYTE // len(chunk)):
                connection.sendall(chunk)
        response = b""
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(65_536):
                response += data
        return response


def flood_in_parallel(port: int, start: bytes, chunk: bytes, megabytes: int) -> list[bytes]:
    """Flood over several connections; return version and status of each response."""
    with ThreadPoolExecutor(ATTACKERS) as pool:
        attacks = [pool.submit(flood, port, start, chunk, megabytes) for _ in range(ATTACKERS)]
    return [attack.result()[:12] for attack in attacks]


@pytest.mark.parametrize("chunk", [CHUNK, HEADER_LINES], ids=["one line", "many lines"])
def test_headers_of_100_megabytes_are_rejected_with_431(service: Service, chunk: bytes) -> None:
    start = b"GET / HTTP/1.1\r\nHost: test\r\nX-Attack: "
    with bearing(service):
        responses = flood_in_parallel(service.port, start, chunk, 100)
    assert responses == ATTACKERS * [b"HTTP/1.1 431"]


CHUNKED = b"%x\r\n%b\r\n" % (len(CHUNK), CHUNK)
BODIES = [
    (b"Content-Length: %d" % (200 * MEGABYTE), CHUNK),
    (b"Transfer-Encoding: chunked", CHUNKED),
]


@pytest.mark.parametrize(("framing", "chunk"), BODIES, ids=["content-length", "chunked"])
def test_body_of_200_megabytes_is_rejected_with_413(
    service: Service, framing: bytes, chunk: bytes
) -> None:
    start = b"POST /length HTTP/1.1\r\nHost: test\r\n" + framing + b"\r\n\r\n"
    with bearing(service):
        responses = flood_in_parallel(service.port, start, chunk, 200)
    assert responses == ATTACKERS * [b"HTTP/1.1 413"]


async def linger(port: int, start: bytes, rest: bytes) -> tuple[bytes, float]:
    """Send `start`, then one byte of `rest` a second.

    Returns version and status of the response, and the seconds until the connection ended.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    begin = time.monotonic()

    async def send() -> None:
        writer.write(start)
        for byte in rest:
            await asyncio.sleep(1)
            writer.write(bytes([byte]))

    sending = asyncio.create_task(send())
    try:
        async with asyncio.timeout(30):
            response = await reader.read()
    except ConnectionError:
        response = b"reset"
    seconds = time.monotonic() - begin
    sending.cancel()
    writer.close()
    return response[:12], seconds


#: Slow clients: the bytes sent at once, those sent slowly, and the expected response.
SLOW = [
    (b"GET / HTTP/1.1\r\nHost: te", b"st\r\nX-Slow: " + bytes(30), b"HTTP/1.1 408"),
    (
        b"POST /length HTTP/1.1\r\nHost: test\r\nContent-Length: 30\r\n\r\n",
        bytes(30),
        b"HTTP/1.1 408",
    ),
    (b"", b"", b""),
]


def test_200_slow_clients_are_disconnected_in_time(service: Service) -> None:
    """Slow headers, slow bodies and idle connections end soon after the timeout."""
    clients = [SLOW[number % len(SLOW)] for number in range(SLOW_CLIENTS)]

    async def attack() -> list[tuple[bytes, float]]:
        return await asyncio.gather(
            *(linger(service.port, start, rest) for start, rest, _ in clients)
        )

    with bearing(service):
        ends = asyncio.run(attack())
    expected = Counter(response for _, _, response in clients)
    assert Counter(response for response, _ in ends) == expected
    slowest = max(seconds for _, seconds in ends)
    print(f"the slowest was disconnected after {slowest:.1f} s")
    assert slowest < TIMEOUT_SECONDS + SLACK_SECONDS


async def get_at_once(port: int, path: str, number: int) -> list[httpx.Response]:
    """Send GET requests over a connection each, all at the same time."""
    limits = httpx.Limits(max_connections=number)
    address = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=30) as client:
        return await asyncio.gather(*(client.get(path) for _ in range(number)))


def assert_overload_problem(response: httpx.Response) -> None:
    """Assert that a rejection says when to retry, and names its request."""
    assert response.headers["retry-after"] == "1"
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["status"] == 503
    assert response.json()["request_id"] == response.headers["x-request-id"]


def test_300_requests_over_a_small_cap_are_rejected_at_once(urls: dict[str, str]) -> None:
    """Each rejection has a request ID, a log line and a metric; probes still pass."""
    requests = 300
    cap = 20
    seconds = 5.0
    with serving(APP, MAX_IN_FLIGHT=str(cap), **urls) as service:
        service.wait()
        eventually(lambda: len(workers(service)) == 2)
        with load(service.port, 2 * [get("/health/live", keeps_alive=False, pause=0.05)]) as probes:
            responses = asyncio.run(get_at_once(service.port, f"/slow?seconds={seconds}", requests))
        print(f"probes: {probes}")
        assert probes.failures == [], str(probes)
        served = [response for response in responses if response.status_code == 200]
        rejected = [response for response in responses if response.status_code == 503]
        assert len(served) + len(rejected) == requests
        assert cap <= len(served) <= 2 * cap
        slowest = max(response.elapsed.total_seconds() for response in rejected)
        print(f"{len(served)} served, {len(rejected)} rejected, the slowest after {slowest:.2f} s")
        # None has waited for a request that was served.
        assert slowest < seconds

        ids = {response.headers["x-request-id"] for response in rejected}
        assert len(ids) == len(rejected)
        for response in rejected:
            assert_overload_problem(response)
        label = 'http_response_status_code="503"'
        eventually(lambda: counted(service, label) >= len(rejected))
        assert counted(service, label) == len(rejected)
        assert service.stop() == 0
        access = [line for line in service.lines if line["logger"] == "access"]
        assert {line["request_id"] for line in access if line["status"] == 503} == ids


def dropped_lines(service: Service) -> int:
    """Return the number of access-log lines that were dropped, as in the metrics."""
    line = r"^access_log_dropped_lines_total (.+)$"
    found = re.search(line, service.metrics(), re.MULTILINE)
    return round(float(found[1])) if found else 0


def test_stalled_log_reader_drops_access_lines_but_no_requests(urls: dict[str, str]) -> None:
    """Every access line is either written or counted as dropped."""
    with tempfile.TemporaryFile() as kept:
        reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=kept)
        with serving(APP, 0, reader.stdin, **urls) as service:
            service.wait()
            with load(service.port, MIXED) as result, frozen(reader.pid):
                eventually(lambda: dropped_lines(service) > 1000, 60)
            print(result)
            assert result.failures == [], str(result)
            dropped = dropped_lines(service)
            assert service.stop() == 0
        assert reader.wait(20) == 0
        kept.seek(0)
        lines = [json.loads(line) for line in kept]
    access = [line for line in lines if line["logger"] == "access"]
    written = [line for line in access if not line["route"].startswith("/health/")]
    print(f"{len(written)} access lines written, {dropped} dropped")
    assert len(written) + dropped == result.total
    assert {line["level"] for line in lines} == {"info"}
