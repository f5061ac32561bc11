"""`Directory` and `QuickRoute` respond as FastAPI does, to every request and for every route.

The same application is built twice. Of each pair of responses, status, headers and body are equal,
and so are the dependencies that were called, in their order.
"""

from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from fastapi.dependencies.utils import get_parameterless_sub_dependant
from fastapi.exceptions import ResponseValidationError

from tests.web import every_route
from tests.web.every_route import PATHS

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS")
HEADERS: list[dict[str, str]] = [
    {},
    {"X-Key": "k", "Cookie": "session=s", "Authorization": "Bearer t"},
    {"Host": "other.example"},
]
BODIES = [b"", b'{"number": 1}', b'{"item": {"number": 1}}', b'{"number": "x"}', b"{"]

Outcome = tuple[int, list[tuple[bytes, bytes]], bytes, list[str]]


class Pair:
    """Both applications."""

    def __init__(self, root_path: str = "", dependencies: list[Any] | None = None) -> None:
        self.apps: list[FastAPI] = []
        self.clients: list[httpx.AsyncClient] = []
        for is_quick in (False, True):
            app = every_route.create(is_quick=is_quick, dependencies=dependencies)
            transport = httpx.ASGITransport(app, raise_app_exceptions=False, root_path=root_path)
            self.apps.append(app)
            self.clients.append(httpx.AsyncClient(transport=transport, base_url="http://test"))

    async def send(self, method: str, path: str, **options: Any) -> list[Outcome]:
        """Return the outcome of a request to each."""
        return [await _send(client, method, path, options) for client in self.clients]


async def _send(
    client: httpx.AsyncClient, method: str, path: str, options: dict[str, Any]
) -> Outcome:
    calls: list[str] = []
    every_route.calls.set(calls)
    client.cookies.clear()
    response = await client.request(method, path, **options)
    return response.status_code, response.headers.raw, response.content, calls


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


@pytest.mark.parametrize("path", PATHS)
async def test_responses_are_those_of_fastapi(pair: Pair, path: str) -> None:
    for method in METHODS:
        for headers in HEADERS:
            expected, found = await pair.send(method, path, headers=headers)
            assert found == expected, (method, headers)


async def test_bodies_are_read_as_fastapi_reads_them(pair: Pair) -> None:
    paths = [
        *("/body", "/embedded/1", "/embedded/x", "/raw", "/v1/outer/inner/5", "/inner/x"),
        *("/query", "/authenticated/1"),
    ]
    for path in paths:
        for method in ("GET", "POST", "PUT"):
            for body in BODIES:
                for kind in ("application/json", "text/plain"):
                    headers = {"Content-Type": kind, "X-Key": "k"}
                    expected, found = await pair.send(method, path, content=body, headers=headers)
                    assert found == expected, (path, method, body)


async def test_root_path_is_removed_as_fastapi_does() -> None:
    pair = Pair(root_path="/service")
    paths = ["/service" + path for path in PATHS]
    for path in (*paths, "/service-a/model/5", "/other/model/5", "/model/5", "/v1/outer/inner/5"):
        expected, found = await pair.send("GET", path, headers=HEADERS[1])
        assert found == expected, path


@pytest.mark.parametrize("dependency", [every_route.authenticate, every_route.opened])
async def test_dependencies_of_the_application_are_called(dependency: Any) -> None:
    pair = Pair(dependencies=[Depends(dependency)])
    for number, path in enumerate(PATHS):
        headers = HEADERS[number % 2]
        expected, found = await pair.send("GET", path, headers=headers)
        assert found == expected, (path, headers)


async def override() -> str:
    """Replace a dependency."""
    every_route.called("override")
    return "overridden"


async def test_dependency_overrides_are_honored(pair: Pair) -> None:
    """Set after the first request, as tests of a team do, and removed again."""
    names = ("by_request", "authenticate", "nested", "opened", "in_thread")
    for app in pair.apps:
        app.dependency_overrides |= {getattr(every_route, name): override for name in names}
    for path in PATHS:
        expected, found = await pair.send("GET", path)
        assert found == expected, path
    for app in pair.apps:
        app.dependency_overrides.clear()
    expected, found = await pair.send("GET", "/by-request/1")
    assert found == expected
    assert found[3] == ["by_request"]


async def test_dependencies_added_to_a_route_later_are_called() -> None:
    """Integrations insert them into the route that they find, such as for authentication."""
    pair = Pair()
    await pair.send("GET", "/model/5")
    for app in pair.apps:
        path = "/model/{number}"
        route: Any = next(each for each in app.routes if getattr(each, "path", "") == path)
        depends = Depends(every_route.authenticate)
        added = get_parameterless_sub_dependant(depends=depends, path=path)
        route.dependant.dependencies.insert(0, added)
    for headers, status in ((HEADERS[0], 401), (HEADERS[1], 200)):
        expected, found = await pair.send("GET", "/model/5", headers=headers)
        assert found == expected
        assert found[0] == status


async def test_invalid_result_is_reported_in_the_same_words(pair: Pair) -> None:
    messages = []
    for app in pair.apps:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            with pytest.raises(ResponseValidationError) as error:
                await client.get("/invalid-result")
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert "GET /invalid-result" in messages[0]
