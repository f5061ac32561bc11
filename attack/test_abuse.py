"""Clients that send too much, too slowly, or too many at once: others are served meanwhile, and memory is bounded."""

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

MEGABYTE = 1 << 20
PIECE = b"x" * 65_536
SLOW_CLIENTS = 200
TIMEOUT_SECONDS = 2  # for heads and for bodies
SLACK_SECONDS = (
    5  # timeouts are looked at once a second, on a busy machine; without ours they take 10
)
BUSY_SECONDS = 5  # no other request may take longer, on a machine that has much to do


@pytest.fixture(scope="module")
def service(urls: dict[str, str]) -> Iterator[Service]:
    """One service, warm, for all attacks."""
    timeouts = {
        "HEADER_TIMEOUT_SECONDS": str(TIMEOUT_SECONDS),
        "REQUEST_BODY_TIMEOUT_SECONDS": str(TIMEOUT_SECONDS),
    }
    with serving("tests.fault_routes:app", **timeouts, **urls) as service:
        service.wait()
        eventually(lambda: len(workers(service)) == 2)
        with load(service.port, MIXED):
            time.sleep(2)
        yield service


@contextlib.contextmanager
def bearing(service: Service) -> Iterator[None]:
    """Hold that memory stays bounded meanwhile, that no worker dies, and that other requests are served."""
    pids = workers(service)
    with (
        every(0.05, lambda: resident_bytes(pids)) as memory,
        load(service.port, 4 * [get("/", "GET")]) as others,
    ):
        yield
    growth = {
        pid: (max(seen.get(pid, 0) for seen in memory) - memory[0][pid]) / MEGABYTE for pid in pids
    }
    slowest = max(others.slowest_seconds.values())
    print(
        f"memory grew by {max(growth.values()):.1f} MB; others: {others}, the slowest {slowest:.2f} s"
    )
    assert max(growth.values()) < 20, growth
    assert others.failures == [], str(others)
    assert others.total > 0
    assert slowest < BUSY_SECONDS
    assert workers(service) == pids


def flood(port: int, head: bytes, piece: bytes, megabytes: int) -> bytes:
    """Send a head, then a piece again and again, until that is sent or the server closes; return what it answered."""
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(head)
            for _ in range(megabytes * MEGABYTE // len(piece)):
                connection.sendall(piece)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(65_536):
                answer += data
        return answer


@pytest.mark.parametrize(
    "piece",
    [PIECE, b"\r\n".join(repeat(b"X-Attack: " + b"x" * 100, 500))],
    ids=["one line", "many lines"],
)
def test_a_header_of_100_megabytes_is_431_and_closed(service: Service, piece: bytes) -> None:
    with bearing(service), ThreadPoolExecutor(4) as pool:
        head = b"GET / HTTP/1.1\r\nHost: test\r\nX-Attack: "
        answers = list(pool.map(lambda _: flood(service.port, head, piece, 100), range(4)))
    assert [answer[:12] for answer in answers] == 4 * [b"HTTP/1.1 431"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_200_megabytes_is_413_and_closed(service: Service, chunked: bool) -> None:
    how = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % (200 * MEGABYTE)
    head = b"POST /length HTTP/1.1\r\nHost: test\r\n" + how + b"\r\n\r\n"
    piece = b"%x\r\n%b\r\n" % (len(PIECE), PIECE) if chunked else PIECE
    with bearing(service), ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: flood(service.port, head, piece, 200), range(4)))
    assert [answer[:12] for answer in answers] == 4 * [b"HTTP/1.1 413"]


async def linger(port: int, head: bytes, rest: bytes) -> tuple[bytes, float]:
    """Send a head, then a byte of the rest each second; return version and status of the answer, seconds to its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    start = time.monotonic()

    async def send() -> None:
        writer.write(head)
        for byte in rest:
            await asyncio.sleep(1)
            writer.write(bytes([byte]))

    sending = asyncio.create_task(send())
    try:
        async with asyncio.timeout(30):
            answer = await reader.read()
    except ConnectionError:
        answer = b"reset"
    seconds = time.monotonic() - start
    sending.cancel()
    writer.close()
    return answer[:12], seconds


def test_200_slow_clients_are_sent_away_in_time(service: Service) -> None:
    half_a_head = b"GET / HTTP/1.1\r\nHost: te", b"st\r\nX-Slow: " + bytes(30)
    slow_body = b"POST /length HTTP/1.1\r\nHost: test\r\nContent-Length: 30\r\n\r\n", bytes(30)
    idle = b"", b""
    kinds = {half_a_head: b"HTTP/1.1 408", slow_body: b"HTTP/1.1 408", idle: b""}

    async def attack() -> list[tuple[bytes, float]]:
        some = [
            kind for kind, _ in zip(SLOW_CLIENTS * list(kinds), range(SLOW_CLIENTS), strict=False)
        ]
        return await asyncio.gather(*(linger(service.port, *kind) for kind in some))

    with bearing(service):
        ends = asyncio.run(attack())
    expected = Counter(list(kinds.values())[number % len(kinds)] for number in range(SLOW_CLIENTS))
    assert Counter(answer for answer, _ in ends) == expected
    slowest = max(seconds for _, seconds in ends)
    print(f"the slowest was sent away after {slowest:.1f} s")
    assert slowest < TIMEOUT_SECONDS + SLACK_SECONDS


def test_300_connections_against_a_small_cap_are_refused_at_once_and_on_the_record(
    urls: dict[str, str],
) -> None:
    cap, seconds = 20, 5.0

    async def attack(port: int) -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=300)
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=30
        ) as client:
            return await asyncio.gather(
                *(client.get(f"/slow?seconds={seconds}") for _ in range(300))
            )

    with serving("tests.fault_routes:app", MAX_IN_FLIGHT=str(cap), **urls) as service:
        service.wait()
        eventually(lambda: len(workers(service)) == 2)
        with load(service.port, 2 * [get("/health/live", keeps_alive=False, pause=0.05)]) as probes:
            answers = asyncio.run(attack(service.port))
        print(f"probes: {probes}")
        assert probes.failures == [], str(probes)
        served = [answer for answer in answers if answer.status_code == 200]
        refused = [answer for answer in answers if answer.status_code == 503]
        assert len(served) + len(refused) == 300
        assert cap <= len(served) <= 2 * cap
        slowest = max(answer.elapsed.total_seconds() for answer in refused)
        print(f"{len(served)} served, {len(refused)} refused, the slowest after {slowest:.2f} s")
        assert slowest < seconds  # nobody waited for one that was served

        ids = {answer.headers["x-request-id"] for answer in refused}
        assert len(ids) == len(refused)
        for answer in refused:
            assert answer.headers["retry-after"] == "1"
            assert answer.headers["content-type"] == "application/problem+json"
            assert (answer.json()["status"], answer.json()["request_id"]) == (
                503,
                answer.headers["x-request-id"],
            )
        eventually(lambda: counted(service, 'http_response_status_code="503"') >= len(refused))
        assert counted(service, 'http_response_status_code="503"') == len(refused)
        assert service.stop() == 0
        logged = {
            line["request_id"]
            for line in service.lines
            if line["logger"] == "access" and line["status"] == 503
        }
        assert logged == ids


def test_a_reader_of_the_log_that_stops_costs_access_lines_and_nothing_else(
    urls: dict[str, str],
) -> None:
    def dropped(service: Service) -> int:
        found = re.search(r"^access_log_dropped_lines_total (.+)$", service.metrics(), re.MULTILINE)
        return round(float(found[1])) if found else 0

    with tempfile.TemporaryFile() as kept:
        reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=kept)
        with serving("tests.fault_routes:app", 0, reader.stdin, **urls) as service:
            service.wait()
            with load(service.port, MIXED) as result, frozen(reader.pid):
                eventually(lambda: dropped(service) > 1000, 60)
            print(result)
            assert result.failures == [], str(result)
            number = dropped(service)
            assert service.stop() == 0
        assert reader.wait(20) == 0
        kept.seek(0)
        lines = [json.loads(line) for line in kept]
    written = [
        line
        for line in lines
        if line["logger"] == "access" and not line["route"].startswith("/health/")
    ]
    print(f"{len(written)} access lines written, {number} dropped")
    assert len(written) + number == result.total
    assert {line["level"] for line in lines} == {"info"}
