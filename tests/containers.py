"""Containers for tests: each test starts its own, inspects it and removes it."""

import contextlib
import functools
import json
import subprocess
from collections.abc import Iterator
from typing import Any

from tests.conftest import missing

# The images that the generated project names; `.ci/engine` builds substitutes without a registry.
BASE = "python:3.13-slim"
POSTGRES = "postgres:18"
REDIS = "redis:8"
NGINX = "nginx:1.30"
RABBITMQ = "rabbitmq:4.3"
#: The restrictions of a pod, as options of `docker run`.
RESTRICTED = [
    "--read-only",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges:true",
    "--memory=256m",
    "--memory-swap=256m",
    "--cpus=1",
    "--tmpfs=/tmp:size=32m",
    "--stop-timeout=60",
]


def docker(*arguments: str, check: bool = True) -> str:
    """Run docker and return its output. Raises `AssertionError` on errors if `check`."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        msg = f"docker {' '.join(arguments)}: {done.stderr or done.stdout}"
        raise AssertionError(msg)
    return done.stdout.strip()


def is_present(image: str) -> bool:
    """Return whether the engine has an image."""
    return bool(json.loads(docker("image", "inspect", image, check=False)))


def is_available(image: str) -> bool:
    """Return whether the engine has an image, or can pull it."""
    if not is_present(image):
        pull = ["docker", "pull", "--quiet", image]
        subprocess.run(pull, check=False, capture_output=True)
    return is_present(image)


@functools.cache
def needs_engine() -> None:
    """Skip unless a container engine runs and has, or can pull, all images."""
    try:
        docker("info")
    except (FileNotFoundError, AssertionError):
        missing("a running container engine (`.ci/engine` starts one on Debian)")
    for image in (BASE, POSTGRES, REDIS, NGINX):
        if not is_available(image):
            missing(f"the image {image} (`.ci/engine` builds a substitute on Debian)")


def inspect(name: str, *, kind: str = "container") -> Any:
    """Return the details of a container or an image, as `docker inspect` prints them."""
    return json.loads(docker("inspect", "--type", kind, name))[0]


def is_healthy(name: str) -> bool:
    """Return whether the container's own health check passes."""
    return bool(inspect(name)["State"]["Health"]["Status"] == "healthy")


def logs(name: str) -> str:
    """Return the output of a container, stdout and stderr."""
    done = subprocess.run(
        ["docker", "logs", name],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    return done.stdout


@contextlib.contextmanager
def container(*arguments: str) -> Iterator[str]:
    """Run a container in the background and yield its ID; remove it at the end.

    `arguments` are those of `docker run`.
    """
    name = docker("run", "--detach", *arguments)
    try:
        yield name
    finally:
        docker("rm", "--force", "--volumes", name)


def published(name: str, port: int) -> int:
    """Return the port of the host that forwards to a port of the container."""
    return int(docker("port", name, str(port)).rpartition(":")[2])
