"""The image builds from a private package index whose certificate a private authority signed."""

import base64
import os
import shutil
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError

import pytest

from tests.conftest import Bake, missing
from tests.containers import docker, needs_engine
from tests.projects import make

pytestmark = [pytest.mark.slow, pytest.mark.engine]
VERSION = "private-index"
LOGIN = ("builder", "hunter2")
PRINT_INDEX = "from pip._internal.models.index import PyPI; print(PyPI.url)"
#: `docker build` on the host's network, where the index of this test listens.
DOCKER = """#!/bin/sh
[ "$1" = build ] || exec DOCKER "$@"
shift
exec DOCKER build --network=host --no-cache "$@"
"""


class Index(ThreadingHTTPServer):
    """Forwards to the index of pip, for clients that log in."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = upstream
        self.served: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Index
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        login = base64.b64encode(":".join(LOGIN).encode()).decode()
        if self.headers["Authorization"] != f"Basic {login}":
            self.respond(401, b"", "text/plain")
            return
        headers = {"Accept": self.headers["Accept"] or "*/*"}
        request = urllib.request.Request(self.server.upstream + self.path, headers=headers)
        try:
            with urllib.request.urlopen(request) as response:
                self.server.served.append(self.path)
                self.respond(200, response.read(), response.headers["Content-Type"])
        except HTTPError as error:
            self.respond(error.code, b"", "text/plain")

    do_HEAD = do_GET  # noqa: N815 - http.server names it

    def respond(self, status: int, body: bytes, content_type: str) -> None:
        self.send_response(status)
        if status == 401:
            self.send_header("WWW-Authenticate", 'Basic realm="index"')
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def create_certificates(directory: Path) -> None:
    """Create an authority, and a certificate for localhost that it signed."""
    create = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    authority = ["-subj", "/CN=authority", "-out", "ca.pem", "-keyout", "ca.key"]
    server = ["-subj", "/CN=index", "-out", "index.pem", "-keyout", "index.key"]
    signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "subjectAltName=DNS:localhost"]
    for options in (
        [*authority, "-addext", "keyUsage=critical,keyCertSign"],
        [*server, *signed, "-addext", "basicConstraints=CA:FALSE"],
    ):
        subprocess.run([*create, *options], cwd=directory, check=True, capture_output=True)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    needs_engine()
    if not shutil.which("openssl"):
        missing("openssl")
    python = shutil.which("python3") or sys.executable
    command = [python, "-c", PRINT_INDEX]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        missing("pip, whose index the test forwards to,")
    create_certificates(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "index.pem", tmp_path / "index.key")
    with Index(done.stdout.strip().rstrip("/")) as server:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def build(project: Path, directory: Path, index: Index, **variables: str) -> None:
    """Run `make image` of the project. Raises `AssertionError` if it fails."""
    program = directory / "bin/docker"
    program.parent.mkdir(exist_ok=True)
    program.write_text(DOCKER.replace("DOCKER", str(shutil.which("docker"))))
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    url = f"https://localhost:{index.server_port}/simple"
    make(project, "image", VERSION=VERSION, INDEX_URL=url, PATH=path, **variables)


def test_image_builds_from_a_private_index(bake: Bake, tmp_path: Path, index: Index) -> None:
    """ "Build secrets" and "Build variables" in the documentation of Docker.

    The password is neither in a layer nor in the history of the image.
    """
    netrc = tmp_path / "netrc"
    user, password = LOGIN
    netrc.write_text(f"machine localhost login {user} password {password}\n")
    project = bake()
    certificates = (tmp_path / "ca.pem").read_text()
    try:
        build(project, tmp_path, index, CA_CERTIFICATES=certificates, NETRC=str(netrc))
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
