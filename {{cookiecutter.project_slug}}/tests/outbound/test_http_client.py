"""The HTTP client over a real socket: bounded, retried only where safe, never redirected."""

import asyncio
import base64
import contextlib
import socket
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import ThreadingHTTPServer
from threading import Thread

import pytest
from prometheus_client import REGISTRY

from app.outbound import http_client
from app.outbound.circuit_breaker import CircuitBreaker, CircuitOpenError
from app.outbound.http_client import UpstreamClient, UpstreamError, UpstreamResponse
from app.telemetry.context import request_context
from scripts.quiet_http import QuietHandler

KEY = {"Idempotency-Key": "a"}
#: Time limit of a response on a busy machine.
PATIENT_SECONDS = 30.0


class Handler(QuietHandler):
    server: "Upstream"

    def do_POST(self) -> None:  # noqa: N802 - http.server names it
        self.body = self.read_body()
        self.server.requests.append(self)
        # A later request of the connection has the same handler.
        self.server.authorizations.append(self.headers.get("Authorization", ""))
        self.server.respond(self)

    do_GET = do_POST  # noqa: N815 - http.server names it


Respond = Callable[[Handler], None]


class Upstream(ThreadingHTTPServer):
    """A server that responds as a test requires, and keeps its requests."""

    daemon_threads = True

    def __init__(self) -> None:
        self.requests: list[Handler] = []
        self.authorizations: list[str] = []
        self.respond: Respond = lambda request: respond(request, 200)
        super().__init__(("127.0.0.1", 0), Handler)


def respond(request: Handler, status: int, body: bytes = b"{}", **headers: str) -> None:
    request.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body)


@contextlib.contextmanager
def run_upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.shutdown()


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with run_upstream() as server:
        yield server


@pytest.fixture
async def client(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[UpstreamClient]:
    monkeypatch.setattr(http_client, "ATTEMPT_SECONDS", PATIENT_SECONDS)
    monkeypatch.setattr(http_client, "DEADLINE_SECONDS", PATIENT_SECONDS)
    url = f"http://127.0.0.1:{upstream.server_port}/base"
    client = UpstreamClient("test", url, CircuitBreaker("test", 10))
    yield client
    await client.aclose()


async def test_request_carries_content_headers_and_request_id(
    upstream: Upstream, client: UpstreamClient
) -> None:
    token = request_context.set({"request_id": "r-1"})
    response = await client.request("POST", "/charges", KEY, json={"a": 1})
    assert response == UpstreamResponse(200, b"{}")
    request_context.reset(token)
    (request,) = upstream.requests
    assert request.path == "/base/charges"
    assert request.body == b'{"a":1}'
    assert request.headers["X-Request-ID"] == "r-1"
    assert request.headers["Idempotency-Key"] == "a"


@pytest.mark.parametrize(
    ("method", "headers", "attempts"),
    [("POST", {}, 1), ("POST", KEY, 3), ("GET", {}, 3)],
    ids=["unsafe", "key", "safe"],
)
@pytest.mark.parametrize("status", [429, 500, 503])
async def test_only_idempotent_requests_are_retried(
    upstream: Upstream,
    client: UpstreamClient,
    method: str,
    headers: dict[str, str],
    attempts: int,
    status: int,
) -> None:
    upstream.respond = lambda request: respond(request, status)
    with pytest.raises(UpstreamError, match=str(status)):
        await client.request(method, "/", headers)
    assert len(upstream.requests) == attempts


async def test_retry_succeeds_when_the_upstream_recovers(
    upstream: Upstream, client: UpstreamClient
) -> None:
    def recover(request: Handler) -> None:
        is_first = len(upstream.requests) == 1
        respond(request, 503 if is_first else 201)

    upstream.respond = recover
    assert (await client.request("POST", "/", KEY)).status == 201


@pytest.mark.parametrize("status", [302, 307, 400, 404, 422])
async def test_redirects_and_client_errors_are_returned(
    upstream: Upstream, client: UpstreamClient, status: int
) -> None:
    upstream.respond = lambda request: respond(request, status, Location="/elsewhere")
    assert (await client.request("POST", "/", KEY)).status == status
    assert len(upstream.requests) == 1


def hang(_: Handler) -> None:
    time.sleep(2 * PATIENT_SECONDS)


def drip(request: Handler) -> None:
    request.send_response(200)
    request.send_header("Content-Length", "1000")
    request.end_headers()
    for _ in range(1000):
        request.wfile.write(b"x")
        time.sleep(0.1)


def cut(request: Handler) -> None:
    # close() would wait for the files of the handler.
    request.connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("behavior", [hang, drip, cut])
async def test_unfinished_response_is_a_failure_after_bounded_time(
    upstream: Upstream, client: UpstreamClient, behavior: Respond, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "ATTEMPT_SECONDS", 0.3)
    upstream.respond = behavior
    start = time.monotonic()
    with pytest.raises(UpstreamError):
        await client.request("POST", "/", KEY)
    assert time.monotonic() - start < PATIENT_SECONDS / 2
    assert client.breaker.failures == 3


@pytest.mark.parametrize("behavior", [hang, drip])
async def test_all_attempts_together_take_bounded_time(
    upstream: Upstream, client: UpstreamClient, behavior: Respond, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "DEADLINE_SECONDS", 0.5)
    upstream.respond = behavior
    start = time.monotonic()
    with pytest.raises(UpstreamError, match="in time"):
        await client.request("POST", "/", KEY)
    assert time.monotonic() - start < PATIENT_SECONDS / 2


async def test_cookies_of_the_upstream_are_not_kept(
    upstream: Upstream, client: UpstreamClient
) -> None:
    def set_cookie(request: Handler) -> None:
        respond(request, 200, b"", **{"Set-Cookie": "session=1; Path=/"})

    upstream.respond = set_cookie
    for _ in range(2):
        await client.request("GET", "/", {})
    assert len(upstream.requests) == 2
    assert not any("Cookie" in request.headers for request in upstream.requests)


async def test_oversized_response_is_not_read(
    upstream: Upstream, client: UpstreamClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "MAX_RESPONSE_BYTES", 1000)
    upstream.respond = lambda request: respond(request, 200, bytes(1001))
    with pytest.raises(UpstreamError, match="TooLarge"):
        await client.request("POST", "/", {})
    upstream.respond = lambda request: respond(request, 200, bytes(1000))
    assert (await client.request("POST", "/", {})).body == bytes(1000)


async def test_open_circuit_stops_the_retries(upstream: Upstream, client: UpstreamClient) -> None:
    """The circuit opens after the second of three attempts."""
    client.breaker.max_failures = 2
    upstream.respond = lambda request: respond(request, 503)
    with pytest.raises(CircuitOpenError):
        await client.request("POST", "/", KEY)
    assert len(upstream.requests) == 2


async def test_proxy_of_the_environment_is_not_used(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{upstream.server_port}")
    client = UpstreamClient("test", "http://127.0.0.1:1", CircuitBreaker("test"))
    with pytest.raises(UpstreamError, match="ConnectError"):
        await client.request("POST", "/", {})
    await client.aclose()
    assert upstream.requests == []


async def test_credentials_of_the_url_are_sent_and_in_no_error(upstream: Upstream) -> None:
    """As basic authentication: RFC 7617, section 2."""
    url = f"http://user:p%40ss@127.0.0.1:{upstream.server_port}"
    client = UpstreamClient("test", url, CircuitBreaker("test"))
    assert (await client.request("POST", "/", {})).status == 200
    upstream.respond = cut
    with pytest.raises(UpstreamError) as failed:
        await client.request("POST", "/", {})
    await client.aclose()
    expected = base64.b64encode(b"user:p@ss").decode()
    assert {request.headers["Authorization"] for request in upstream.requests} == {
        f"Basic {expected}"
    }
    text = "".join(traceback.format_exception(failed.value))
    assert "p@ss" not in text
    assert "p%40ss" not in text


def write_nonsense(request: Handler) -> None:
    request.wfile.write(b"nonsense\r\n\r\n")


def cut_body(request: Handler) -> None:
    respond(request, 200, b"{}", **{"Content-Length": "9"})


@pytest.mark.parametrize(
    ("behavior", "outcome"),
    [
        (cut, "RemoteProtocolError"),
        (write_nonsense, "RemoteProtocolError"),
        (cut_body, "RemoteProtocolError"),
    ],
)
async def test_broken_response_has_the_same_outcome_in_the_metrics(
    upstream: Upstream, client: UpstreamClient, behavior: Respond, outcome: str
) -> None:
    def respond_and_close(request: Handler) -> None:
        behavior(request)
        request.close_connection = True

    labels = {"upstream": "test", "outcome": outcome}
    name = "http_client_request_duration_seconds_count"
    before = REGISTRY.get_sample_value(name, labels) or 0
    upstream.respond = respond_and_close
    with pytest.raises(UpstreamError, match=outcome):
        await client.request("POST", "/", {})
    assert REGISTRY.get_sample_value(name, labels) == before + 1


async def test_connections_are_reused_up_to_the_limit(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "ATTEMPT_SECONDS", PATIENT_SECONDS)
    url = f"http://127.0.0.1:{upstream.server_port}"
    client = UpstreamClient("test", url, CircuitBreaker("test"), connections=2)
    await asyncio.gather(*(client.request("POST", "/", {}) for _ in range(20)))
    await client.aclose()
    assert len(upstream.requests) == 20
    assert len({request.client_address for request in upstream.requests}) <= 2


async def test_cancelled_request_leaves_no_response_to_the_next_one(
    upstream: Upstream, client: UpstreamClient
) -> None:
    """Whenever it is cancelled: aiohttp 3.14.0 returned such connections to the pool.

    https://github.com/aio-libs/aiohttp/issues/12795
    """

    def echo(request: Handler) -> None:
        time.sleep(0.002)
        respond(request, 200, request.body)

    upstream.respond = echo
    for number in range(40):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(number / 8000):
                await client.request("POST", "/", {}, data=b"cancelled")
        expected = str(number).encode()
        assert (await client.request("POST", "/", {}, data=expected)).body == expected
