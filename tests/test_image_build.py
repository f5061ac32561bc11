"""The image builds from a private package index whose certificate a private authority signed."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Bake
from tests.containers import docker, needs_engine
from tests.private_index import LOGIN, Index, private_index
from tests.projects import make

pytestmark = [pytest.mark.slow, pytest.mark.engine]
VERSION = "private-index"
#: `docker build` on the host's network, where the index of this test listens.
DOCKER = """#!/bin/sh
[ "$1" = build ] || exec DOCKER "$@"
shift
exec DOCKER build --network=host --no-cache "$@"
"""


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    needs_engine()
    with private_index(tmp_path) as server:
        yield server


def build(project: Path, directory: Path, index: Index, **variables: str) -> None:
    """Run `make image` of the project. Raises `AssertionError` if it fails."""
    program = directory / "bin/docker"
    program.parent.mkdir(exist_ok=True)
    program.write_text(DOCKER.replace("DOCKER", str(shutil.which("docker"))))
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    make(project, "image", VERSION=VERSION, INDEX_URL=index.url, PATH=path, **variables)


def test_image_builds_from_a_private_index(bake: Bake, tmp_path: Path, index: Index) -> None:
    """ "Build secrets" and "Build variables" in the documentation of Docker.

    The password is neither in a layer nor in the history of the image.
    """
    _, password = LOGIN
    project = bake()
    certificates = (tmp_path / "ca.pem").read_text()
    try:
        build(
            project,
            tmp_path,
            index,
            CA_FILE=str(tmp_path / "ca.pem"),
            NETRC=str(tmp_path / "netrc"),
        )
        image = f"my-service:{VERSION}"
        history = docker("history", "--no-trunc", image)
        trusted = docker("run", "--rm", image, "cat", "/etc/ssl/certs/ca-certificates.crt")
        left = docker("run", "--rm", "--user=0", image, "sh", "-c", "ls -A /root; env")
    finally:
        docker("image", "rm", "--force", f"my-service:{VERSION}")
    assert {"/simple/uv/", "/simple/fastapi/"} <= set(index.served)
    for text in (history, left):
        assert password not in text
        assert str(index.server_port) not in text
    assert certificates.strip() not in trusted


def test_authority_that_is_not_trusted_fails_the_build(
    bake: Bake, tmp_path: Path, index: Index
) -> None:
    with pytest.raises(AssertionError, match=r"(?i)certificate"):
        build(bake(), tmp_path, index)
    assert index.served == []
