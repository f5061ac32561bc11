"""Fixtures of authentication: a provider of tokens."""

from collections.abc import Iterator

import pytest

from tests import default_token
from tests.auth.provider import Provider, running_provider


@pytest.fixture(scope="module", autouse=True)
def _no_default_token() -> Iterator[None]:
    """Have these tests start from a service without authentication, whatever `app.main` says."""
    with default_token.suspended():
        yield


@pytest.fixture
def provider() -> Iterator[Provider]:
    """A provider for one test: `mint`, `rotate`, `revoke`, `trouble`, `fetches`."""
    with running_provider() as provider:
        yield provider
