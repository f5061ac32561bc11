"""What is refused: each refusal is a problem with an ID, has an access line, and is counted."""

import concurrent.futures
import contextlib
import json
import socket
import time
from collections.abc import Iterator

import psutil
import pytest
from starlette.types import Message

from app.settings import Settings
from app.web.limits import Limits, RejectedError
from scripts.dev_services import Redis
from tests.service_process import DEADLINE_SECONDS, Service, eventually, serving

LIMITS = {
    "WEB_CONCURRENCY": "1",
    "MAX_HEADER_BYTES": "4096",
    "MAX_BODY_BYTES": "100000",
    "MAX_IN_FLIGHT": "4",
    "HEADER_TIMEOUT_SECONDS": "3",  # over the pauses of the tests, by far
    "REQUEST_BODY_TIMEOUT_SECONDS": "2",
    "REQUEST_TIMEOUT_SECONDS": "4",
    "KEEPALIVE_SECONDS": "1",
}
BIG = b"POST /length HTTP/1.1\r\nHost: a\r\nX-Request-ID: %s\r\n"


@pytest.fixture(scope="module")
def service(database_url: str, redis: Redis) -> Iterator[Service]:
    with serving(
        "tests.fault_routes:app", DATABASE_URL=database_url, REDIS_URL=redis.url, **LIMITS
    ) as service:
        service.wait()
        yield service


def send(service: Service, *parts: bytes, pause_seconds: float = 0.0) -> bytes:
    """Send parts of a request over a connection of its own; return all that comes back until it is closed."""
    with socket.create_connection(
        ("127.0.0.1", service.port), timeout=DEADLINE_SECONDS
    ) as connection:
        for part in parts:
            try:
                connection.sendall(part)
            except OSError:  # it has been closed
                break
            time.sleep(pause_seconds)
        answer = b""
        while data := connection.recv(65536):
            answer += data
        return answer


def assert_refused(service: Service, answer: bytes, status: int) -> None:
    """Check the refusal's shape, and that it has left a line and a count."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    assert lines[0].startswith(b"http/1.1 %d" % status), answer[:500]
    assert b"connection: close" in lines
    problem = json.loads(body)
    assert (problem["status"], f"x-request-id: {problem['request_id']}".encode() in lines) == (
        status,
        True,
    )
    eventually(lambda: problem["request_id"] in service.text)
    access = [line for line in service.lines if line.get("request_id") == problem["request_id"]]
    assert [line["status"] for line in access] == [status]
    eventually(lambda: f'http_response_status_code="{status}"' in service.metrics())


@pytest.mark.parametrize("pieces", [1, 20], ids=["at once", "in pieces"])
def test_a_head_that_is_too_large_is_431(service: Service, pieces: int) -> None:
    parts = [
        b"GET / HTTP/1.1\r\nHost: a\r\n",
        *[b"X-Long: " + b"a" * (6000 // pieces) + b"\r\n"] * pieces,
        b"\r\n",
    ]
    if pieces == 1:
        parts = [b"".join(parts)]
    assert_refused(service, send(service, *parts, pause_seconds=0.002), 431)


def test_a_large_body_does_not_count_as_head(service: Service) -> None:
    body = b"a" * 50_000
    head = (
        b"POST /length HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        % len(body)
    )
    assert send(service, head + body).endswith(b"50000")


def test_a_head_that_takes_too_long_is_408(service: Service) -> None:
    assert_refused(service, send(service, b"GET / HTTP/1.1\r\nHost:"), 408)


def test_a_connection_that_asks_nothing_is_closed(service: Service) -> None:
    assert send(service) == b""
    answer = send(service, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert answer.startswith(
        b"HTTP/1.1 200"
    )  # and this one, when it was idle for KEEPALIVE_SECONDS


def test_what_is_not_http_is_400(service: Service) -> None:
    assert_refused(service, send(service, b"\x16\x03\x01 this is TLS\r\n\r\n"), 400)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_413(service: Service, chunked: bool) -> None:
    head = b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"Content-Length: 200000\r\n\r\n"
    part = b"4e20\r\n" + b"a" * 20_000 + b"\r\n" if chunked else b"a" * 20_000
    answer = send(service, BIG % b"large" + head, *[part] * 10, pause_seconds=0.01)
    assert_refused(service, answer, 413)


def test_a_body_that_takes_too_long_is_408(service: Service) -> None:
    answer = send(service, BIG % b"slow-body" + b"Content-Length: 10\r\n\r\n", b"a")
    assert_refused(service, answer, 408)


def test_a_body_that_breaks_its_encoding_is_400(service: Service) -> None:
    answer = send(
        service,
        BIG % b"broken" + b"Transfer-Encoding: chunked\r\n\r\n",
        b"nonsense\r\n",
        pause_seconds=0.1,
    )
    assert_refused(service, answer, 400)


@pytest.mark.parametrize("path", ["/slow?seconds=20", "/slow-thread?seconds=9"])
def test_a_request_that_takes_too_long_is_504(service: Service, path: str) -> None:
    start = time.monotonic()
    answer = service.get(path)
    assert (answer.status_code, answer.json()["request_id"]) == (
        504,
        answer.headers["x-request-id"],
    )
    assert time.monotonic() - start < 8  # also where a thread goes on
    assert service.get("/").status_code == 200


def test_a_stream_may_take_longer(service: Service) -> None:
    answer = service.get("/events?seconds=5")
    assert answer.text.count("data:") == 50


def test_too_many_requests_are_shed_and_probes_answered(service: Service) -> None:
    with contextlib.ExitStack() as streams:  # they last until the end of the block
        for _ in range(4):
            stream = streams.enter_context(service.http.stream("GET", "/events?seconds=60"))
            assert stream.status_code == 200
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            results = list(pool.map(lambda _: service.get("/"), range(16)))
        assert service.get("/health/live").status_code == 200
    for shed in results:
        assert (shed.status_code, shed.headers["retry-after"]) == (503, "1")
        assert shed.json()["detail"] == "The service is busy."
    eventually(lambda: service.get("/").status_code == 200)


def test_pipelined_requests_are_answered_in_order(service: Service) -> None:
    request = b"GET /slow?seconds=0.%d HTTP/1.1\r\nHost: a\r\nX-Request-ID: %d\r\n\r\n"
    answer = send(service, b"".join(request % (3 - number, number) for number in range(3)))
    places = [answer.index(b"x-request-id: %d" % number) for number in range(3)]
    assert places == sorted(places)


def test_garbage_behind_a_request_does_not_cost_its_answer(service: Service) -> None:
    answer = send(service, b"GET /slow?seconds=0.3 HTTP/1.1\r\nHost: a\r\n\r\nnonsense\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b"HTTP/1.1") == 1


def test_an_answer_to_head_is_written(service: Service) -> None:
    answer = send(service, b"HEAD /docs HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 404")
    assert answer.endswith(b"\r\n\r\n")


def test_a_body_is_asked_for_with_100_continue(service: Service) -> None:
    head = (
        BIG % b"continue"
        + b"Expect: 100-continue\r\nConnection: close\r\nContent-Length: 3\r\n\r\n"
    )
    answer = send(service, head, b"abc", pause_seconds=0.1)
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200")


async def test_a_body_within_the_bounds_passes_unchanged() -> None:
    parts: list[Message] = [
        {"type": "http.request", "body": b"ab", "more_body": True},
        {"type": "http.request", "body": b"c", "more_body": False},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Message:
        return parts[done.pop()]

    done = [2, 1, 0]
    bounded = Limits(Settings(max_body_bytes=3)).limit_receive({"state": {}}, receive)
    assert [await bounded() for _ in range(3)] == parts
    done = [1, 0]
    bounded = Limits(Settings(max_body_bytes=2)).limit_receive({"state": {}}, receive)
    await bounded()
    with pytest.raises(RejectedError) as refusal:
        await bounded()
    assert refusal.value.status_code == 413


def test_a_body_that_comes_behind_a_slow_answer_is_served(service: Service) -> None:
    first = b"GET /slow?seconds=0.5 HTTP/1.1\r\nHost: a\r\n\r\n"
    head = b"POST /length HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 3\r\n\r\n"
    answer = send(service, first + head, b"abc", pause_seconds=0.8)
    assert answer.count(b"HTTP/1.1 200") == 2
    assert answer.endswith(b"3")


def test_a_head_that_follows_a_large_body_is_not_charged_for_it(service: Service) -> None:
    body = b"a" * 50_000
    first = b"POST /length HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    answer = send(
        service,
        first + b"GET / HTTP/1.1\r\nHo",
        b"st: a\r\nConnection: close\r\n\r\n",
        pause_seconds=0.2,
    )
    assert answer.count(b"HTTP/1.1 200") == 2


def test_only_a_few_requests_may_wait_behind_another(service: Service) -> None:
    flood = b"GET /slow?seconds=0.1 HTTP/1.1\r\nHost: a\r\n\r\n" * 5000
    assert send(service, flood).count(b"HTTP/1.1 200") < 20


def test_fields_behind_a_body_are_ignored(service: Service) -> None:
    head = b"POST /length HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    trailer = b"X-Trailer: " + b"a" * 60 + b"\r\n"
    answer = send(service, head + b"3\r\nabc\r\n0\r\n" + trailer * 20 + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 200")


def test_an_answer_that_nobody_reads_is_cut_off(service: Service) -> None:
    (worker,) = {
        line["pid"]
        for line in service.lines
        if line["message"].startswith("Started server process")
    }
    with socket.create_connection(
        ("127.0.0.1", service.port), timeout=DEADLINE_SECONDS
    ) as connection:
        connection.sendall(b"GET /large?megabytes=20 HTTP/1.1\r\nHost: a\r\n\r\n")
        size, address = len(connection.recv(1)), connection.getsockname()
        eventually(
            lambda: address not in {each.raddr for each in psutil.Process(worker).net_connections()}
        )
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(1 << 20):
                size += len(data)
        assert size < 20 << 20
