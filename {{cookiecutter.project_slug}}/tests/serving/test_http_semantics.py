"""Requests and responses as RFC 9110 and RFC 9112 require them."""

import json
from collections.abc import Iterator

import pytest

from scripts.dev_services import Redis
from tests.service_process import Service, eventually, serving
from tests.serving.raw_http import CLOSE, access_line, assert_rejected, headers_of, send

GET = b"GET / HTTP/1.1\r\n"
HOST = b"Host: a\r\n"
POST = b"POST /length HTTP/1.1\r\n" + HOST


@pytest.fixture(scope="module")
def service(database_url: str, redis: Redis) -> Iterator[Service]:
    app = "tests.fault_routes:app"
    with serving(
        app, DATABASE_URL=database_url, REDIS_URL=redis.url, WEB_CONCURRENCY="1"
    ) as service:
        service.wait()
        yield service


# Host


@pytest.mark.parametrize(
    "fields",
    [
        b"",
        b"Host: a\r\nHost: a\r\n",
        b"Host: a\r\nHost: b\r\n",
        b"Host: a b\r\n",
        b"Host: a/b\r\n",
        b"Host: user@a\r\n",
        b"Host: http://a\r\n",
        b"Host: a:b\r\n",
        b"Host: a:80:80\r\n",
        b"Host: [::1\r\n",
        b"Host: [:::]\r\n",
        b"Host: ::1\r\n",
        b"Host: a%zz\r\n",
        b"Host: a\\b\r\n",
        b"Host: \xe4\r\n",
    ],
)
def test_request_without_one_valid_host_is_rejected_with_400(
    service: Service, fields: bytes
) -> None:
    """RFC 9112, section 3.2: missing, more than one, or an invalid value."""
    response = send(service, GET + fields + b"\r\n")
    line = assert_rejected(service, response, 400)
    assert line["path"] == "/"
    assert b"connection: close" in headers_of(response)


@pytest.mark.parametrize(
    "host",
    [b"a", b"a.example:8000", b"127.0.0.1", b"[::1]:8000", b"", b"a:", b"x_y", b"%c3%a4.example"],
)
def test_valid_host_is_served(service: Service, host: bytes) -> None:
    """RFC 3986, section 3.2.2. The value is empty if the target has no authority."""
    response = send(service, GET + b"Host: " + host + b"\r\n" + CLOSE + b"\r\n")
    assert response.startswith(b"HTTP/1.1 200")


def test_http_1_0_may_have_no_host_but_not_two(service: Service) -> None:
    """RFC 9112, section 3.2: one is required of HTTP/1.1."""
    assert send(service, b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")
    assert_rejected(service, send(service, b"GET / HTTP/1.0\r\n" + HOST * 2 + b"\r\n"), 400)


# Transfer codings


@pytest.mark.parametrize(
    "coding",
    [b"gzip, chunked", b"gzip\r\nTransfer-Encoding: chunked", b"x, chunked", b"br,chunked"],
)
def test_other_transfer_coding_is_rejected_with_501(service: Service, coding: bytes) -> None:
    """RFC 9112, section 6.1: a coding that the server does not understand."""
    body = b"3\r\nabc\r\n0\r\n\r\n"
    response = send(service, POST + b"Transfer-Encoding: " + coding + b"\r\n\r\n" + body)
    assert_rejected(service, response, 501)
    assert b"connection: close" in headers_of(response)


@pytest.mark.parametrize("coding", [b"gzip", b"chunked, gzip", b"identity"])
def test_body_that_does_not_end_with_chunked_is_rejected_with_400(
    service: Service, coding: bytes
) -> None:
    """RFC 9112, section 6.3: its length cannot be determined."""
    response = send(service, POST + b"Transfer-Encoding: " + coding + b"\r\n\r\nabc")
    assert_rejected(service, response, 400)


@pytest.mark.parametrize("coding", [b"chunked", b"Chunked"])
def test_chunked_body_is_read(service: Service, coding: bytes) -> None:
    """RFC 9112, section 7: names of codings are case-insensitive."""
    headers = POST + CLOSE + b"Transfer-Encoding: " + coding + b"\r\n\r\n"
    assert send(service, headers + b"3\r\nabc\r\n0\r\n\r\n").endswith(b"\r\n\r\n3")


# HTTP/1.0


@pytest.mark.parametrize("path", [b"/events?seconds=0.3", b"/chunked"])
def test_stream_to_http_1_0_has_no_chunks(service: Service, path: bytes) -> None:
    """RFC 9112, section 6.1: no Transfer-Encoding unless the request is HTTP/1.1."""
    response = send(service, b"GET " + path + b" HTTP/1.0\r\n" + HOST + b"\r\n")
    headers, _, body = response.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in headers.lower()
    assert b"connection: close" in headers.lower()
    expected = {b"/chunked": b"one two"}
    assert body == expected.get(path, b"data: 0\n\ndata: 1\n\ndata: 2\n\n")


def test_response_to_http_1_0_keeps_its_length(service: Service) -> None:
    response = send(service, b"GET / HTTP/1.0\r\n" + HOST + b"\r\n")
    headers, _, body = response.partition(b"\r\n\r\n")
    assert b"content-length: %d" % len(body) in headers.lower()
    assert json.loads(body)["service"]


def test_http_1_0_gets_no_100_continue(service: Service) -> None:
    """RFC 9110, section 10.1.1: the expectation of an HTTP/1.0 request MUST be ignored."""
    headers = b"POST /length HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n"
    response = send(service, headers, b"abc", pause_seconds=0.2)
    assert response.startswith(b"HTTP/1.1 200")
    assert b"100 Continue" not in response


@pytest.mark.parametrize(
    ("path", "status"), [(b"/bug", b"500"), (b"/nowhere", b"404"), (b"/status?status=204", b"204")]
)
def test_other_responses_to_http_1_0_are_complete(
    service: Service, path: bytes, status: bytes
) -> None:
    response = send(service, b"GET " + path + b" HTTP/1.0\r\n\r\n")
    assert response.startswith(b"HTTP/1.1 " + status)
    assert response.count(b"HTTP/1.1") == 1


# HEAD


@pytest.mark.parametrize(
    "path",
    [
        b"/",
        b"/health/live",
        b"/health/ready",
        b"/large?megabytes=1",
        b"/mounted/item/5",
        b"/own-headers",
    ],
)
def test_head_has_the_headers_of_get_without_the_body(service: Service, path: bytes) -> None:
    """RFC 9110, sections 9.1 and 9.3.2: wherever GET works, with the same fields."""
    end = b" HTTP/1.1\r\n" + HOST + CLOSE + b"X-Request-ID: a\r\n\r\n"
    get = send(service, b"GET " + path + end)
    head = send(service, b"HEAD " + path + end)
    assert head.endswith(b"\r\n\r\n")
    assert _without_date(head) == _without_date(get)
    assert any(header.startswith(b"content-length: ") for header in headers_of(head))


def _without_date(response: bytes) -> list[bytes]:
    return [header for header in headers_of(response) if not header.startswith(b"date:")]


def test_head_of_a_stream_ends_at_once(service: Service) -> None:
    response = send(service, b"HEAD /events?seconds=60 HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n")
    assert response.startswith(b"HTTP/1.1 200")
    assert response.endswith(b"\r\n\r\n")
    eventually(lambda: "http_server_active_requests 0.0" in service.metrics())


def test_connection_is_kept_after_head(service: Service) -> None:
    head = b"HEAD / HTTP/1.1\r\n" + HOST + b"\r\n"
    response = send(service, head + head + GET + HOST + CLOSE + b"\r\n")
    assert response.count(b"HTTP/1.1 200") == 3
    assert response.count(b'{"service"') == 1


def test_head_has_its_own_line_and_count(service: Service) -> None:
    request = b"HEAD /mounted/item/5 HTTP/1.1\r\n" + HOST + CLOSE + b"X-Request-ID: head\r\n\r\n"
    send(service, request)
    line = access_line(service, "head")
    assert (line["method"], line["route"]) == ("HEAD", "/mounted/item/{number}")
    assert line["response_bytes"] == 0
    eventually(lambda: 'http_request_method="HEAD"' in service.metrics())


def test_route_of_head_takes_precedence(service: Service) -> None:
    end = b" /head-and-get HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n"
    assert b"x-route: head" in headers_of(send(service, b"HEAD" + end))
    assert send(service, b"GET" + end).endswith(b'"get"')


@pytest.mark.parametrize(
    ("path", "status"), [(b"/nowhere", b"404"), (b"/length", b"405"), (b"/mounted/item/a", b"422")]
)
def test_error_of_head_has_no_body(service: Service, path: bytes, status: bytes) -> None:
    response = send(service, b"HEAD " + path + b" HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n")
    assert response.startswith(b"HTTP/1.1 " + status)
    assert response.endswith(b"\r\n\r\n")
    assert response.count(b"\r\n\r\n") == 1


def test_allow_lists_head_with_get(service: Service) -> None:
    """RFC 9110, section 10.2.1: all methods that the resource supports."""
    response = send(service, b"DELETE / HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n")
    assert b"allow: get, head" in headers_of(response)
    response = send(service, b"GET /length HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n")
    assert b"allow: post" in headers_of(response)


# Single fields


@pytest.mark.parametrize("path", [b"/", b"/own-headers", b"/bug", b"/nowhere"])
def test_response_has_one_date_and_one_request_id(service: Service, path: bytes) -> None:
    """RFC 9110, sections 5.3 and 6.6.1: they are no lists. The ID is the one of the log."""
    request = b"GET " + path + b" HTTP/1.1\r\n" + HOST + CLOSE + b"X-Request-ID: mine\r\n\r\n"
    headers = headers_of(send(service, request))
    dates = [header for header in headers if header.startswith(b"date:")]
    request_ids = [header for header in headers if header.startswith(b"x-request-id:")]
    assert len(dates) == 1
    assert b"2001" not in dates[0]
    assert request_ids == [b"x-request-id: mine"]


# Contexts


def test_context_variable_does_not_leak_into_the_next_request(service: Service) -> None:
    """PEP 567: a task has a copy of the context in which it is created."""
    request = b"GET /context?value=%d HTTP/1.1\r\n" + HOST + b"%b\r\n"
    pipelined = b"".join(request % (n, CLOSE * (n == 3)) for n in range(4))
    assert send(service, pipelined).count(b'"nothing"') == 4
    apart = [request % (n, CLOSE * (n == 3)) for n in range(4)]
    assert send(service, *apart, pause_seconds=0.1).count(b'"nothing"') == 4
