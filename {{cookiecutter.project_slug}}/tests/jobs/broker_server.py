"""The RabbitMQ of the tests."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from scripts.dev_rabbitmq import NO_RABBITMQ, find_program
from scripts.dev_services import free_port


def require_rabbitmq() -> None:
    """Skip the test on a machine without RabbitMQ. In CI its absence is a failure."""
    if find_program():
        return
    if os.environ.get("CI") == "true":
        pytest.fail(NO_RABBITMQ)
    pytest.skip(NO_RABBITMQ)


class Certificate:
    """A certificate for `localhost` of no authority, and the listener of RabbitMQ that has it."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "localhost.pem"
        self.key = directory / "localhost.key"
        self.port = free_port()
        self.exists = shutil.which("openssl") is not None
        if self.exists:
            self._create()

    def _create(self) -> None:
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
        names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
        files = ["-out", str(self.file), "-keyout", str(self.key)]
        subprocess.run([*command, *names, *files], check=True, capture_output=True)

    @property
    def settings(self) -> dict[str, str]:
        """The lines of rabbitmq.conf."""
        if not self.exists:
            return {}
        return {
            "listeners__ssl__1": f"127.0.0.1:{self.port}",
            "ssl_options__cacertfile": str(self.file),
            "ssl_options__certfile": str(self.file),
            "ssl_options__keyfile": str(self.key),
            "ssl_options__verify": "verify_none",
            "ssl_options__fail_if_no_peer_cert": "false",
        }
