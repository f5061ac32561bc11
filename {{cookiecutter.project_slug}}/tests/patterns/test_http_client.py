"""Calls over a real socket: bounded, tried again only where that is safe, and sent nowhere else."""

import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from app.patterns import http_client as clients
from app.patterns.circuit_breaker import CircuitBreaker, CircuitOpenError
from app.patterns.http_client import UpstreamClient, UpstreamError, UpstreamResponse
from app.telemetry.context import request_context

KEY = {"Idempotency-Key": "a"}
#: Of an upstream that answers: on a busy machine that may take a while.
PATIENT_SECONDS = 30.0


class Upstream(ThreadingHTTPServer):
    """Answers with what `answer` says; keeps the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        self.answer: Callable[[BaseHTTPRequestHandler], None] = lambda request: reply(request, 200)
        self.requests: list[BaseHTTPRequestHandler] = []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # the client has left
            self.close_connection = True

    def do_POST(self) -> None:
        upstream: Upstream = self.server  # type: ignore[assignment]
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        upstream.requests.append(self)
        upstream.answer(self)

    do_GET = do_POST  # noqa: N815 - http.server names it

    def log_message(self, *_: object) -> None:
        pass


def reply(
    request: BaseHTTPRequestHandler, status: int, body: bytes = b"{}", **headers: str
) -> None:
    request.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body)


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.shutdown()


@pytest.fixture
async def client(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[UpstreamClient]:
    monkeypatch.setattr(clients, "ATTEMPT_SECONDS", PATIENT_SECONDS)
    monkeypatch.setattr(clients, "DEADLINE_SECONDS", PATIENT_SECONDS)
    client = UpstreamClient(
        "test", f"http://127.0.0.1:{upstream.server_port}/base", CircuitBreaker("test", 10)
    )
    yield client
    await client.http.aclose()


async def test_a_call_carries_its_content_its_fields_and_the_id_of_the_request(
    upstream: Upstream, client: UpstreamClient
) -> None:
    token = request_context.set({"request_id": "r-1"})
    assert await client.request("POST", "/charges", KEY, json={"a": 1}) == UpstreamResponse(
        200, b"{}"
    )
    request_context.reset(token)
    (request,) = upstream.requests
    assert (request.path, request.body) == ("/base/charges", b'{"a":1}')  # type: ignore[attr-defined]
    assert (request.headers["X-Request-ID"], request.headers["Idempotency-Key"]) == ("r-1", "a")


@pytest.mark.parametrize(
    ("method", "headers", "tries"),
    [("POST", {}, 1), ("POST", KEY, 3), ("GET", {}, 3)],
    ids=["unsafe", "key", "safe"],
)
@pytest.mark.parametrize("status", [429, 500, 503])
async def test_only_what_may_be_done_twice_is_tried_again(
    upstream: Upstream,
    client: UpstreamClient,
    method: str,
    headers: dict[str, str],
    tries: int,
    status: int,
) -> None:
    upstream.answer = lambda request: reply(request, status)
    with pytest.raises(UpstreamError, match=str(status)):
        await client.request(method, "/", headers)
    assert len(upstream.requests) == tries


async def test_an_upstream_that_recovers_costs_a_try(
    upstream: Upstream, client: UpstreamClient
) -> None:
    upstream.answer = lambda request: reply(request, 503 if len(upstream.requests) == 1 else 201)
    assert (await client.request("POST", "/", KEY)).status == 201


@pytest.mark.parametrize("status", [302, 307, 400, 404, 422])
async def test_an_answer_that_is_no_outage_is_returned_and_no_redirect_followed(
    upstream: Upstream, client: UpstreamClient, status: int
) -> None:
    upstream.answer = lambda request: reply(request, status, Location="/elsewhere")
    assert (await client.request("POST", "/", KEY)).status == status
    assert len(upstream.requests) == 1


def hang(_: BaseHTTPRequestHandler) -> None:
    time.sleep(2 * PATIENT_SECONDS)


def drip(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.send_header("Content-Length", "1000")
    request.end_headers()
    for _ in range(1000):
        request.wfile.write(b"x")
        time.sleep(0.1)


def cut(request: BaseHTTPRequestHandler) -> None:
    request.connection.shutdown(socket.SHUT_RDWR)  # to close it would wait for the handler's files


@pytest.mark.parametrize("answer", [hang, drip, cut])
async def test_an_upstream_that_does_not_finish_costs_bounded_time_and_counts_as_down(
    upstream: Upstream,
    client: UpstreamClient,
    answer: Callable[[BaseHTTPRequestHandler], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clients, "ATTEMPT_SECONDS", 0.3)
    upstream.answer = answer
    start = time.monotonic()
    with pytest.raises(UpstreamError):
        await client.request("POST", "/", KEY)
    assert time.monotonic() - start < PATIENT_SECONDS / 2
    assert client.breaker.failed == 3


@pytest.mark.parametrize("answer", [hang, drip])
async def test_all_tries_together_cost_bounded_time(
    upstream: Upstream,
    client: UpstreamClient,
    answer: Callable[[BaseHTTPRequestHandler], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clients, "DEADLINE_SECONDS", 0.5)
    upstream.answer = answer
    start = time.monotonic()
    with pytest.raises(UpstreamError, match="in time"):
        await client.request("POST", "/", KEY)
    assert time.monotonic() - start < PATIENT_SECONDS / 2


async def test_cookies_of_the_upstream_are_not_kept(
    upstream: Upstream, client: UpstreamClient
) -> None:
    def set_a_cookie(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Set-Cookie", "session=1; Path=/")
        request.send_header("Content-Length", "0")
        request.end_headers()

    upstream.answer = set_a_cookie
    for _ in range(2):
        await client.request("GET", "/", {})
    assert len(upstream.requests) == 2
    assert not any("Cookie" in request.headers for request in upstream.requests)


async def test_an_answer_that_is_too_large_is_not_read(
    upstream: Upstream, client: UpstreamClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "MAX_RESPONSE_BYTES", 1000)
    upstream.answer = lambda request: reply(request, 200, bytes(1001))
    with pytest.raises(UpstreamError, match="TooLarge"):
        await client.request("POST", "/", {})
    upstream.answer = lambda request: reply(request, 200, bytes(1000))
    assert (await client.request("POST", "/", {})).body == bytes(1000)


async def test_an_upstream_that_is_left_alone_is_not_called(
    upstream: Upstream, client: UpstreamClient
) -> None:
    client.breaker.failures = 2
    upstream.answer = lambda request: reply(request, 503)
    with pytest.raises(CircuitOpenError):  # after the second of three tries
        await client.request("POST", "/", KEY)
    assert len(upstream.requests) == 2


async def test_the_proxy_of_the_environment_is_not_asked(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{upstream.server_port}")
    client = UpstreamClient("test", "http://127.0.0.1:1", CircuitBreaker("test"))
    with pytest.raises(UpstreamError, match="ConnectError"):
        await client.request("POST", "/", {})
    await client.http.aclose()
    assert upstream.requests == []
