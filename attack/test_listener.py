"""A listener closes while clients connect: each accepted one gets a response."""

import contextlib
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from app.serving.listener import stop_accepting

CLIENTS = 8
CLOSES = 100
#: A lost SYN is sent again after a second: a client that waited for it would miss 30 closes.
CONNECT_SECONDS = 0.02
SERVE_SECONDS = 0.02


def attempt(address: tuple[str, int]) -> str:
    """Connect and send a byte; return the outcome."""
    with socket.socket() as client:
        client.settimeout(CONNECT_SECONDS)
        try:
            client.connect(address)
        except OSError:
            return "refused"
        client.settimeout(10)
        try:
            client.sendall(b"?")
            return "served" if client.recv(1) == b"!" else "closed"
        except OSError:
            return "reset"


def connect_repeatedly(addresses: list[tuple[str, int]], stop: threading.Event) -> Counter[str]:
    """Connect to the newest address until `stop` is set; count the outcomes."""
    outcomes: Counter[str] = Counter()
    while not stop.is_set():
        outcomes[attempt(addresses[-1])] += 1
    return outcomes


def serve(listener: socket.socket) -> None:
    """Respond to all clients that are connected now."""
    with contextlib.suppress(BlockingIOError):
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.setblocking(True)
                connection.recv(1)
                connection.sendall(b"!")


def test_closing_a_listener_resets_no_connection() -> None:
    """Without `stop_accepting`, 10 to 20 connections are reset."""
    addresses = [("127.0.0.1", 1)]
    stop = threading.Event()
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(connect_repeatedly, addresses, stop) for _ in range(CLIENTS)]
        for _ in range(CLOSES):
            with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
                listener.setblocking(False)
                addresses.append(listener.getsockname())
                deadline = time.monotonic() + SERVE_SECONDS
                while time.monotonic() < deadline:
                    serve(listener)
                stop_accepting(listener)
                serve(listener)
        stop.set()
        outcomes = sum((client.result() for client in clients), Counter[str]())
    print(dict(outcomes))
    assert outcomes["served"] > CLOSES
    assert outcomes["reset"] == 0
    assert outcomes["closed"] == 0
