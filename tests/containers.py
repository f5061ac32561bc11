"""Containers for tests: started, asked, and ended by the test that started them."""

import contextlib
import functools
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import missing

#: The images that the generated project names; `.ci/engine` makes stand-ins where no registry can be reached.
BASE, POSTGRES, REDIS, NGINX = "python:3.13-slim", "postgres:18", "redis:8", "nginx:1.30"
#: What a pod is allowed, in the words of Docker.
RESTRICTED = [
    *("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges:true"),
    *(
        "--memory=256m",
        "--memory-swap=256m",
        "--cpus=1",
        "--tmpfs=/tmp:size=32m",
        "--stop-timeout=60",
    ),
]


def docker(*arguments: str, check: bool = True) -> str:
    """Run docker and return what it prints; raise with what it says when it fails."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, (
        f"docker {' '.join(arguments)}: {done.stderr or done.stdout}"
    )
    return done.stdout.strip()


@functools.cache
def needs_engine() -> None:
    """Skip where no container engine runs, or where it can neither find nor pull the images."""
    try:
        docker("info")
    except (FileNotFoundError, AssertionError):
        missing("a running container engine (`.ci/engine` starts one on Debian)")
    for image in (BASE, POSTGRES, REDIS, NGINX):
        if not docker("image", "ls", "--quiet", image):
            subprocess.run(
                ["docker", "pull", "--quiet", image], check=False, stdout=subprocess.DEVNULL
            )
        if not docker("image", "ls", "--quiet", image):
            missing(f"the image {image} (`.ci/engine` makes a stand-in on Debian)")


def inspect(name: str, *, kind: str = "container") -> Any:
    """Return what docker tells of a container or an image."""
    return json.loads(docker("inspect", "--type", kind, name))[0]


def logs(name: str) -> str:
    """Return what a container has printed, to stdout and stderr."""
    command = ["docker", "logs", name]
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    ).stdout


@contextlib.contextmanager
def container(*arguments: str) -> Iterator[str]:
    """Run a container in the background with these arguments of `docker run`; yield its ID, and remove it."""
    name = docker("run", "--detach", *arguments)
    try:
        yield name
    finally:
        docker("rm", "--force", "--volumes", name)


def published(name: str, port: int) -> int:
    """Return the port of this machine that leads to a port of the container."""
    return int(docker("port", name, str(port)).rpartition(":")[2])


def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(look: Callable[[], object], seconds: float = 30) -> None:
    """Wait until `look` returns something true; a connection that fails counts as not yet."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(httpx.TransportError):
            if look():
                return
        time.sleep(0.05)
    msg = f"not within {seconds} s"
    raise AssertionError(msg)


def make(project: Path, *targets: str, **variables: str) -> str:
    """Run make targets of a generated project and return what they print; raise with it when they fail."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in {"MAKEFLAGS", "MFLAGS", "VENV"}
    }
    done = subprocess.run(
        ["make", *targets],
        cwd=project,
        env=inherited | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-10_000:]
    return done.stdout
