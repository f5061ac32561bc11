"""A card gateway for development and tests; it charges each key once: `python -m scripts.gateway [PORT [HOST]]`."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from scripts.services import free_port

DEFAULT_PORT = 8090


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
        status, answer = self.server.charge(key, dict(self.headers.items())) if key else (400, {"error": "no key"})
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
    """Run the consumer beside the block, and a gateway for it unless `GATEWAY_URL` names another."""
    metrics = f"127.0.0.1:{free_port()}"
    own = {"METRICS_BIND": metrics, "ENVIRONMENT": "development"}
    programs = [["app.payments.consumer"]]
    default = f"http://127.0.0.1:{DEFAULT_PORT}"
    if os.environ.get("GATEWAY_URL", default) == default:
        port = str(free_port())
        own["GATEWAY_URL"] = f"http://127.0.0.1:{port}"
        programs.append(["scripts.gateway", port])
    environment = {name: text for name, text in os.environ.items() if name != "PROMETHEUS_MULTIPROC_DIR"} | own
    running = [subprocess.Popen([sys.executable, "-m", *program], env=environment) for program in programs]
    sys.stdout.write(f"payments are charged beside it, by a consumer that is not reloaded: http://{metrics}/metrics\n")
    sys.stdout.write(f"their events, in another terminal: REDIS_URL={os.environ.get('REDIS_URL', '')} make tail\n")
    sys.stdout.flush()
    try:
        yield
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


if __name__ == "__main__":
    with gateway(int(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_PORT, *sys.argv[2:]) as running:
        sys.stdout.write(f"a gateway that charges everybody: {running.url}\n")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
