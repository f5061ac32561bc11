"""The RabbitMQ of the tests."""

import os

import pytest

from scripts.dev_rabbitmq import NO_RABBITMQ, find_program


def require_rabbitmq() -> None:
    """Skip the test on a machine without RabbitMQ. In CI its absence is a failure."""
    if find_program():
        return
    if os.environ.get("CI") == "true":
        pytest.fail(NO_RABBITMQ)
    pytest.skip(NO_RABBITMQ)
