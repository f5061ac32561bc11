"""A real nginx or haproxy in front of two instances."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scripts.dev_services import is_listening
from tests.service_process import eventually

from prerequisites import program

ATTACK = Path(__file__).parent
COMMANDS = {
    "nginx": ("nginx", "-e", "stderr", "-c", "nginx.conf"),
    "haproxy": ("haproxy", "-db", "-f", "haproxy.cfg"),
}


def configuration(template: str, values: dict[str, object]) -> str:
    """Return a configuration file of this directory with its placeholders replaced."""
    text = (ATTACK / template).read_text()
    for key, value in values.items():
        text = text.replace(f"@{key}@", str(value))
    return text


@contextlib.contextmanager
def proxy(
    name: str, port: int, instances: tuple[int, int], connections: int = 2048
) -> Iterator[None]:
    """Run nginx or haproxy on a loopback port, in front of the ports of two instances.

    `connections` is the limit of nginx, for those of clients and those to the service.
    """
    executable, *options, template = COMMANDS[name]
    path = program(executable)
    # Neither needs root.
    user = "nobody" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as directory:
        file = Path(directory, template)
        values = {
            "DIRECTORY": directory,
            "PORT": port,
            "PORT_1": instances[0],
            "PORT_2": instances[1],
            "CONNECTIONS": connections,
        }
        file.write_text(configuration(template, values))
        if user:
            shutil.chown(directory, user)
        output = Path(directory, "output")
        with output.open("w") as log:
            process = subprocess.Popen(
                [path, *options, file], user=user, cwd=directory, stdout=log, stderr=log
            )
        try:
            eventually(lambda: process.poll() is not None or is_listening(port))
            assert process.poll() is None, output.read_text()
            yield
        finally:
            process.terminate()
            process.wait()
