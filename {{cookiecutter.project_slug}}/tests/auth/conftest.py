"""Fixtures of authentication: a provider of tokens."""

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.auth.provider import Provider

if importlib.util.find_spec("cryptography") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def provider() -> "Iterator[Provider]":
    """A provider for one test: `mint`, `rotate`, `revoke`, `trouble`, `fetches`."""
    from tests.auth.provider import running_provider

    with running_provider() as provider:
        yield provider
