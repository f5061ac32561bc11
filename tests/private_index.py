"""A package index that requires a login, with a certificate that a private authority signed."""

import base64
import shutil
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError

from tests.conftest import missing

LOGIN = ("builder", "hunter2")
PRINT_INDEX = "from pip._internal.models.index import PyPI; print(PyPI.url)"


class Index(ThreadingHTTPServer):
    """Forwards to the index of pip, for clients that log in."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = upstream
        self.served: list[str] = []

    @property
    def url(self) -> str:
        """The address for pip and uv."""
        return f"https://localhost:{self.server_port}/simple"


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


@contextmanager
def private_index(directory: Path) -> Iterator[Index]:
    """Serve the index. `directory` gets its authority, `ca.pem`, and its login, `netrc`."""
    if not shutil.which("openssl"):
        missing("openssl")
    python = shutil.which("python3") or sys.executable
    command = [python, "-c", PRINT_INDEX]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        missing("pip, whose index the test forwards to,")
    create_certificates(directory)
    user, password = LOGIN
    (directory / "netrc").write_text(f"machine localhost login {user} password {password}\n")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(directory / "index.pem", directory / "index.key")
    with Index(done.stdout.strip().rstrip("/")) as server:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
