"""Fixtures of authentication: a provider of tokens."""

from collections.abc import Iterator

import pytest

from tests.auth.provider import Provider, running_provider


@pytest.fixture
def provider() -> Iterator[Provider]:
    """A provider for one test: `mint`, `rotate`, `revoke`, `trouble`, `fetches`."""
    with running_provider() as provider:
        yield provider
