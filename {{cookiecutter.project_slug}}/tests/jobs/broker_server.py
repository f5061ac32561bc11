"""The RabbitMQ of the tests."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import aio_pika
import pytest

from app.tasks import background_task
from scripts import dev_rabbitmq
from scripts.dev_rabbitmq import NO_RABBITMQ, RabbitMQ, find_program
from scripts.dev_services import free_port


def require_rabbitmq() -> None:
    """Skip the test on a machine without RabbitMQ. In CI its absence is a failure."""
    if find_program():
        return
    if os.environ.get("CI") == "true":
        pytest.fail(NO_RABBITMQ)
    pytest.skip(NO_RABBITMQ)
