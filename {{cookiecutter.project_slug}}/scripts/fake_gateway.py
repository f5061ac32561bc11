"""A card gateway for development and tests. It charges each idempotency key once.

Usage: `python -m scripts.fake_gateway [PORT [HOST]]`. In the environment, `STATUS` is a status to
respond with in place of charging, and `DELAY_SECONDS` delays each response.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from typing import NamedTuple

from scripts.quiet_http import QuietHandler

DEFAULT_PORT = 8090
DEFAULT_URL = f"http://127.0.0.1:{DEFAULT_PORT}"


class Call(NamedTuple):
    """A request for a charge: its time by `time.monotonic()`, and its headers."""

    at: float
    headers: dict[str, str]


class FakeGateway(ThreadingHTTPServer):
    """A gateway. Tests change its behavior while it runs, and count its calls."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int = 0, host: str = "127.0.0.1") -> None:
        super().__init__((host, port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.Lock()
        self.charged_keys: set[str] = set()

        # Observed
        self.requests: list[Call] = []
        #: Requests by key, whatever their outcome.
        self.calls: Counter[str] = Counter()
        #: Charges by key, which is the ID of the payment.
        self.charges: Counter[str] = Counter()

        # Behavior
        #: The status to respond with in place of charging; 0 charges.
        self.status = 0
        #: The same for single keys.
        self.status_by_key: dict[str, int] = {}
        #: Delay of the response to a charge.
        self.delay_seconds = 0.0
        self.honors_keys = True

    def server_bind(self) -> None:
        """Bind without asking a name server for the name of the address."""
        TCPServer.server_bind(self)
        self.server_name = str(self.server_address[0])
        self.server_port = int(self.server_address[1])

    def charge(self, key: str, headers: dict[str, str]) -> tuple[int, dict[str, str]]:
        """Return the status and the body of the response to a request."""
        with self.lock:
            self.calls[key] += 1
            self.requests.append(Call(time.monotonic(), headers))
            status = self.status or self.status_by_key.get(key, 0)
            if status:
                return status, {"error": "not now"}
            is_new = key not in self.charged_keys or not self.honors_keys
            self.charged_keys.add(key)
            self.charges[key] += is_new
        time.sleep(self.delay_seconds)
        return 201 if is_new else 200, {"charge": key}


class _Handler(QuietHandler):
    server: FakeGateway
    disable_nagle_algorithm = True

    def do_POST(self) -> None:  # noqa: N802 - http.server names it
        """Charge."""
        self.read_body()
        key = self.headers.get("Idempotency-Key")
        if key:
            status, document = self.server.charge(key, dict(self.headers.items()))
        else:
            status, document = 400, {"error": "no key"}
        body = json.dumps(document).encode()
        with contextlib.suppress(OSError):  # the client has disconnected
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)


@contextlib.contextmanager
def run_gateway(port: int = 0, host: str = "127.0.0.1") -> Iterator[FakeGateway]:
    """Run a gateway during the block; port 0 is any free one."""
    with FakeGateway(port, host) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        sys.exit(f"{name}={text}: must be a number")


def main() -> None:
    """Run a gateway until Ctrl-C.

    Raises `SystemExit` for an argument that is not a number, and for a port in use.
    """
    port, *host = sys.argv[1:] or [str(DEFAULT_PORT)]
    status = int(_number("STATUS", os.environ.get("STATUS", "0")))
    delay_seconds = _number("DELAY_SECONDS", os.environ.get("DELAY_SECONDS", "0"))
    behavior = f"responds {status} to every charge" if status else "charges every payment"
    try:
        with run_gateway(int(_number("PORT", port)), *host) as server:
            server.status = status
            server.delay_seconds = delay_seconds
            sys.stdout.write(f"fake gateway on {server.url}: {behavior}\n")
            sys.stdout.flush()
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
    except OSError as error:
        sys.exit(f"{port}: {error.strerror}; stop the other program, or choose another port")


if __name__ == "__main__":
    main()
