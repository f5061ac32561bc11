"""Authentication by middleware of a team, next to the service's own."""

import pytest
from starlette.requests import HTTPConnection

from app.auth.authenticator import Authenticator, Verified
from app.auth.dependencies import Authenticated
from app.auth.errors import InsufficientScopeError
from app.auth.principal import ANONYMOUS, Principal
from app.settings import Settings


async def verify(_: bytes) -> Verified:
    raise AssertionError("the middleware has authenticated the caller")


def request(**state: object) -> HTTPConnection:
    return HTTPConnection({"type": "http", "headers": [], "query_string": b"", "state": state})


async def test_text_of_a_middleware_is_a_caller_without_scopes() -> None:
    """`request.state.principal` may be the text of a subject: app/auth/principal.py."""
    authenticator = Authenticator(Settings(), verify)
    caller = request(authenticator=authenticator, principal="ada")
    assert await Authenticated()(caller) == Principal("ada")
    with pytest.raises(InsufficientScopeError):
        await Authenticated("orders:read")(caller)


async def test_middleware_decides_about_rights_without_an_issuer() -> None:
    caller = request(authenticator=None, principal="ada")
    assert await Authenticated("orders:read")(caller) == Principal("ada")
    assert await Authenticated("orders:read")(request(authenticator=None)) is ANONYMOUS
