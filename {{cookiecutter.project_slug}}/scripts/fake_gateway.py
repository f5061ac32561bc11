"""A card gateway for development and tests; it charges each key once: `python -m scripts.fake_gateway [PORT [HOST]]`.

In the environment, `STATUS` is what it answers in place of charging, and `DELAY_SECONDS` how late it answers.
"""

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from app.telemetry.logs import redact
from scripts.dev_services import free_port

DEFAULT_PORT = 8090
DEFAULT_URL = f"http://127.0.0.1:{DEFAULT_PORT}"


class Gateway(ThreadingHTTPServer):
    """Listens, on the loopback interface unless told otherwise. What it does may be changed while it runs."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int = 0, host: str = "127.0.0.1") -> None:
        super().__init__((host, port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.Lock()
        self.calls: Counter[str] = Counter()  # by key, whatever became of them
        self.charges: Counter[str] = Counter()  # by payment
        self.requests: list[tuple[float, dict[str, str]]] = []  # when, and with which header fields
        self.done: set[str] = set()
        #: The status that it answers in place of charging, for all, or for some payments.
        self.status, self.refused = 0, dict[str, int]()
        #: It charges, and answers later.
        self.delay_seconds = 0.0
        self.honours_keys = True

    def charge(self, key: str, headers: dict[str, str]) -> tuple[int, dict[str, str]]:
        """Return status and body of the answer to a call."""
        with self.lock:
            self.calls[key] += 1
            self.requests.append((time.monotonic(), headers))
            if status := self.status or self.refused.get(key, 0):
                return status, {"error": "not now"}
            is_new = key not in self.done or not self.honours_keys
            self.done.add(key)
            self.charges[key] += is_new
        time.sleep(self.delay_seconds)
        return 201 if is_new else 200, {"charge": key}


class _Handler(BaseHTTPRequestHandler):
    server: Gateway
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        """Charge."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        key = self.headers.get("Idempotency-Key")
        status, answer = (
            self.server.charge(key, dict(self.headers.items()))
            if key
            else (400, {"error": "no key"})
        )
        body = json.dumps(answer).encode()
        with contextlib.suppress(OSError):  # the client has left
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def handle_one_request(self) -> None:
        """Serve a request, or notice that there are no more."""
        try:
            super().handle_one_request()
        except OSError:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Be quiet."""


@contextlib.contextmanager
def gateway(port: int = 0, host: str = "127.0.0.1") -> Iterator[Gateway]:
    """Run a gateway beside the block."""
    with Gateway(port, host) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


@contextlib.contextmanager
def consumer() -> Iterator[None]:
    """Run the consumer beside the block. Where nobody listens at `GATEWAY_URL`'s default, a gateway runs too."""
    environment = os.environ | {
        "METRICS_BIND": f"127.0.0.1:{free_port()}",
        "ENVIRONMENT": "development",
    }
    environment.pop("PROMETHEUS_MULTIPROC_DIR", None)
    programs = [["app.payments.consumer"]]
    url = environment.setdefault("GATEWAY_URL", DEFAULT_URL)
    if url == DEFAULT_URL and not _is_taken(DEFAULT_PORT):
        programs.append(["scripts.fake_gateway", port := str(free_port())])
        environment["GATEWAY_URL"] = f"http://127.0.0.1:{port}"
    running = [
        subprocess.Popen([sys.executable, "-m", *program], env=environment) for program in programs
    ]
    names = ("ENVIRONMENT", "DATABASE_URL", "REDIS_URL", "GATEWAY_URL")
    metrics = environment["METRICS_BIND"]
    servers = {name: f"{name}={shlex.quote(redact(environment.get(name, '')))}" for name in names}
    second = " ".join([*servers.values(), f"METRICS_BIND=127.0.0.1:{free_port()}"])
    sys.stdout.write(
        f"payments are charged beside it, by a consumer that is not reloaded: http://{metrics}/metrics\n"
    )
    sys.stdout.write(f"  in another terminal, their events: {servers['REDIS_URL']} make tail\n")
    sys.stdout.write(f"  and a second consumer: {second} make consume\n")
    sys.stdout.flush()
    try:
        yield
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        sys.exit(f"{name}={text}: takes a number")


def main() -> None:
    """Run a gateway until Ctrl-C. Raises `SystemExit` for what is no number, and for a port that is taken."""
    port, *host = sys.argv[1:] or [str(DEFAULT_PORT)]
    status = int(_number("STATUS", os.environ.get("STATUS", "0")))
    delay_seconds = _number("DELAY_SECONDS", os.environ.get("DELAY_SECONDS", "0"))
    try:
        with gateway(int(_number("PORT", port)), *host) as server:
            server.status, server.delay_seconds = status, delay_seconds
            does = f"answers {status} to" if status else "charges"
            sys.stdout.write(f"a gateway that {does} everybody: {server.url}\n")
            sys.stdout.flush()
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
    except OSError as error:
        sys.exit(f"{port}: {error.strerror}; end who listens there, or name another port")


if __name__ == "__main__":
    main()
