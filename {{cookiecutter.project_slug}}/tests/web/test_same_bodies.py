"""`QuickRoute` reads bodies as FastAPI does: odd media types, JSON that is not valid, lost clients.

Of each pair of responses, status, headers and body are equal, and so are the calls.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Annotated, Any

import pytest
from fastapi import FastAPI, Form
from fastapi.dependencies import utils as dependencies
from starlette.exceptions import HTTPException
from starlette.types import Message

from app.errors import UnavailableError
from app.web.quick_route import QuickRoute
from tests.web import every_route
from tests.web.every_route import BODY_PATHS
from tests.web.test_quick_route import served_by_plan
from tests.web.test_same_responses import Pair

MEDIA_TYPES = [
    *("application/json", "application/json; charset=utf-8", "APPLICATION/JSON"),
    *(" application/json", "application/json; charset=utf-16", "application/vnd.api+json"),
    *("application/json, text/html", "application/jsonx", "application/octet-stream"),
    *("text/plain", "text/json", "json", "/", ""),
    *("application/x-www-form-urlencoded", "multipart/form-data; boundary=b"),
]
VALUES = [
    *("", " ", "null", "true", "1", "1.5", '"text"', "[]", "[1, 2]", "{}", "[[[]]]"),
    *('{"number": 1}', ' \n{"number": 1}\t\n', '{"number": 1} ', '{"number": 1}{}'),
    *('{"number": 1},', '{"number": 1, "number": 2}', '{"number": 1, "number": "x"}'),
    *('{"number": 1, "number": null}', '{"number": null}', '{"number": []}', '{"number": {}}'),
    *('{"number": "1"}', '{"number": 1.0}', '{"number": 1.5}', '{"number": true}'),
    *('{"number": -0}', '{"number": 1e2}', '{"number": 01}', '{"number": +1}', '{"number": 0x1}'),
    *('{"number": NaN}', '{"number": Infinity}', '{"number": 1, "ratio": NaN}'),
    *('{"number": 1, "ratio": -Infinity}', '{"number": 1, "ratio": 1e999}'),
    *('{"Number": 1}', '{"number": 1', "{'number': 1}"),
    *('{"number": 1, "text": "no"}', '{"number": 1, "text": "a longer text"}'),
    *('{"number": 1, "text": "\\u0000\\ud800"}', '{"number": 1, "text": "\\x"}'),
    *('{"number": 1, "text": "a\nb"}', '{"number": 1, "text": null}'),
    *('{"number": 1, "theText": "a"}', '{"number": 1, "extra": 1}', '{"item": 1}'),
    '{"item": {"number": 1}, "other": 2}',
    '{"value": {"number": 1}, "item": {"number": 2}}',
    *('{"number": 9223372036854775808}', '{"number": ' + "9" * 5000 + "}"),
    *("[" * 100_000, '{"a":' * 100_000),
    *("number=1", "// comment", '{"number": /**/ 1}', "undefined", "NaN"),
]
BODIES = [
    *(value.encode() for value in VALUES),
    b"\xef\xbb\xbf" + b'{"number": 1}',
    b'{"number": 1, "text": "\xff"}',
    b'{"number": 1, "text": "\xed\xa0\x80"}',
    b"\x00",
    '{"number": 1}'.encode("utf-16"),
    '{"number": 1}'.encode("utf-32-le"),
]
JSON = {"Content-Type": "application/json", "X-Key": "k"}
#: All are sent with all media types.
FEW_BODIES = [b"", b'{"number": 1}', b'{"number": "x"}', b"{", b"null"]

#: A parameter of the path or the query is not valid, or missing.
INVALID = {"/body-of-dependency/x", "/late-body"}

Receive = Callable[[], Awaitable[Message]]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


@pytest.mark.parametrize("path", ["/body", *BODY_PATHS])
async def test_every_json_is_parsed_as_by_fastapi(pair: Pair, path: str) -> None:
    statuses = set()
    for body in BODIES:
        expected, found = await pair.send("POST", path, content=body, headers=JSON)
        assert found == expected, body[:100]
        statuses.add(found[0])
    assert (200 in statuses) == (path not in INVALID)


@pytest.mark.parametrize("path", ["/body", *BODY_PATHS])
async def test_every_media_type_is_handled_as_by_fastapi(pair: Pair, path: str) -> None:
    for body in FEW_BODIES:
        for media_type in MEDIA_TYPES:
            headers = {"Content-Type": media_type, "X-Key": "k"}
            expected, found = await pair.send("POST", path, content=body, headers=headers)
            assert found == expected, (body, media_type)
        expected, found = await pair.send("POST", path, content=body)
        assert found == expected, (body, "no media type, no key")
        both = [("Content-Type", "text/plain"), ("Content-Type", "application/json")]
        for headers_of_two in (both, both[::-1]):
            expected, found = await pair.send("POST", path, content=body, headers=headers_of_two)
            assert found == expected, (body, headers_of_two)


@pytest.mark.parametrize("path", ["/body", *BODY_PATHS])
async def test_invalid_body_is_reported_after_authentication(pair: Pair, path: str) -> None:
    """A client without a key learns nothing about its body, unless it is not JSON at all."""
    for body in FEW_BODIES:
        headers = {"Content-Type": "application/json"}
        expected, found = await pair.send("POST", path, content=body, headers=headers)
        assert found == expected, body


async def test_overrides_are_honored_with_a_body(pair: Pair) -> None:
    async def override() -> str:
        every_route.called("override")
        return "overridden"

    for app in pair.apps:
        app.dependency_overrides[every_route.authenticate] = override
    for body in FEW_BODIES:
        expected, found = await pair.send("POST", "/body", content=body, headers=JSON)
        assert found == expected, body
    for app in pair.apps:
        app.dependency_overrides.clear()


def parts(*messages: Message | Exception) -> Receive:
    """Return a `receive` that returns these messages, and raises these exceptions."""
    remaining = list(messages)

    async def receive() -> Message:
        # As servers do, the last one again and again.
        message = remaining.pop(0) if len(remaining) > 1 else remaining[0]
        if isinstance(message, Exception):
            raise message
        return message

    return receive


def part(body: bytes, *, is_last: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": not is_last}


DISCONNECT: Message = {"type": "http.disconnect"}


async def call(app: FastAPI, receive: Receive) -> Any:
    """Return the messages of the response to a POST of JSON, the calls, and the exception."""
    calls: list[str] = []
    every_route.calls.set(calls)
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/body",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"x-key", b"k")],
    }
    try:
        await app(scope, receive, send)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is compared
        return sent, calls, repr(error)
    return sent, calls, None


@pytest.mark.parametrize(
    "messages",
    [
        [part(b'{"num'), part(b""), part(b'ber": 1}'), part(b"", is_last=True)],
        [part(b'{"number": 1}', is_last=True), DISCONNECT],
        [{"type": "http.request"}],
        [DISCONNECT],
        [part(b'{"number": 1}'), DISCONNECT],
        [HTTPException(413, "too large", {"Connection": "close"})],
        [part(b'{"number": 1}'), HTTPException(408)],
        # Nothing is read again after an error.
        [HTTPException(413), part(b'{"number": 1}', is_last=True)],
        [UnavailableError("no space"), part(b'{"number": 1}', is_last=True)],
        [OSError("broken"), part(b'{"number": 1}', is_last=True)],
        [ValueError("broken"), part(b'{"number": 1}', is_last=True)],
        [part(b'{"number": 1}'), OSError("broken")],
        [DISCONNECT, part(b'{"number": 1}', is_last=True)],
    ],
)
async def test_body_in_parts_is_read_as_by_fastapi(pair: Pair, messages: list[Any]) -> None:
    usual, quick = pair.apps
    expected = await call(usual, parts(*messages))
    found = await call(quick, parts(*messages))
    assert found == expected


def test_forms_are_read_by_fastapi(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the definition of the route needs python-multipart here."""
    monkeypatch.setattr(dependencies, "ensure_multipart_is_installed", lambda: None)
    app = FastAPI()
    app.router.route_class = QuickRoute

    @app.post("/form")
    async def form(item: Annotated[every_route.Item, Form()]) -> Any:
        return item

    @app.post("/field")
    async def field(number: Annotated[int, Form()]) -> Any:
        return number

    @app.post("/json")
    async def of_json(item: every_route.Item) -> Any:
        return item

    assert served_by_plan(app) == {"/json"}
