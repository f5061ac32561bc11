"""A real nginx and a real haproxy in front of two instances."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.service_process import eventually

COMMANDS = {
    "nginx": ("nginx", "-e", "stderr", "-c", "nginx.conf"),
    "haproxy": ("haproxy", "-db", "-f", "haproxy.cfg"),
}


def program(name: str) -> str:
    """Return the path of a program; without it the test is skipped, or fails where everything is to run."""
    if found := shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin"):
        return found
    text = f"{name} is missing: install the Debian package of that name"
    if os.environ.get("CI") == "true":
        pytest.fail(f"{text}; CI=true makes that a failure")
    pytest.skip(text)


@contextlib.contextmanager
def proxy(name: str, port: int, instances: tuple[int, int]) -> Iterator[None]:
    """Run nginx or haproxy on a loopback port, in front of the ports of two instances."""
    name, *options, template = COMMANDS[name]
    path = program(name)
    user = "nobody" if os.geteuid() == 0 else None  # neither needs root
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
        text = (Path(__file__).parent / template).read_text()
        values = {"FOLDER": folder, "PORT": port, "PORT_1": instances[0], "PORT_2": instances[1]}
        for key, value in values.items():
            text = text.replace(f"@{key}@", str(value))
        file, output = Path(folder, template), Path(folder, "output")
        file.write_text(text)
        if user:
            shutil.chown(folder, user)
        with output.open("w") as log:
            process = subprocess.Popen(
                [path, *options, file], user=user, cwd=folder, stdout=log, stderr=log
            )
        try:
            eventually(lambda: process.poll() is not None or listens(port))
            assert process.poll() is None, output.read_text()
            yield
        finally:
            process.terminate()
            process.wait()


def listens(port: int) -> bool:
    """Tell whether somebody listens on a loopback port."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False
