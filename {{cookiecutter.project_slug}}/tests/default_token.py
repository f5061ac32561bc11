"""The token that the clients of tests send, if the application asks each caller for one.

`app.main` decides: with `create_app(..., dependencies=[AUTHENTICATED])` the tests have a provider,
and their clients a token with each scope of the application. Without, nothing is different.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from tests.auth.provider import running_provider
from tests.auth.tokens import AUDIENCE, signing_key

#: More than the tests last.
LIFETIME_SECONDS = 86_400
#: Settings of the service, as in the environment.
settings: dict[str, str] = {}
#: Headers of a request. A test that sends another token, or an empty one, overrides them.
headers: dict[str, str] = {}


@contextlib.contextmanager
def sending(app: FastAPI) -> Iterator[None]:
    """Have the clients send a token during the block, if the application asks for one."""
    if not getattr(app, "mandatory_dependencies", ()):
        yield
        return
    with running_provider() as provider:
        provider.keys = [signing_key("ES256")]
        token = provider.mint(
            sub="tests", scope=" ".join(scopes(app)), exp=int(time.time()) + LIFETIME_SECONDS
        )
        # Without discovery each start needs only one request, which is done before the first token.
        settings["AUTH_JWKS_URL"] = provider.jwks_url
        settings["AUTH_ISSUER"] = provider.issuer
        settings["AUTH_AUDIENCE"] = AUDIENCE
        headers["Authorization"] = f"Bearer {token}"
        try:
            yield
        finally:
            settings.clear()
            headers.clear()


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """Have the clients send no token during the block, in which tests have providers of their own.

    A service that starts in it trusts no other provider.
    """
    kept_settings = settings.copy()
    kept_headers = headers.copy()
    settings.clear()
    headers.clear()
    try:
        yield
    finally:
        settings.update(kept_settings)
        headers.update(kept_headers)


def scopes(app: FastAPI) -> list[str]:
    """Return the scopes that the routes require: OpenAPI, "Security Requirement Object".

    The service's own document has none, since authentication is off in its settings.
    """
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    paths: dict[str, dict[str, Any]] = document["paths"]
    requirements = [
        names
        for path in paths.values()
        for operation in path.values()
        for requirement in operation.get("security", [])
        for names in requirement.values()
    ]
    return sorted({name for names in requirements for name in names})
