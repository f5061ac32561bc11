"""A listener closes while clients go on connecting: whoever was accepted is answered."""

import contextlib
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from app.serving.listener import stop_accepting

CLOSES = 100


def ask(address: list[tuple[str, int]], stop: threading.Event) -> Counter[str]:
    """Connect to the newest address again and again; return how often somebody answered, refused, or broke off."""
    ends: Counter[str] = Counter()
    while not stop.is_set():
        with socket.socket() as client:
            client.settimeout(
                0.02
            )  # or it would wait a second for its second try, and miss 30 closes
            try:
                client.connect(address[-1])
            except OSError:
                ends["refused"] += 1
                continue
            client.settimeout(10)
            with contextlib.suppress(OSError):
                client.sendall(b"?")
                ends["answered" if client.recv(1) == b"!" else "closed"] += 1
                continue
            ends["reset"] += 1
    return ends


def serve(listener: socket.socket) -> None:
    """Answer whoever has connected."""
    with contextlib.suppress(BlockingIOError):
        while True:
            with listener.accept()[0] as connection:
                connection.setblocking(True)
                connection.recv(1)
                connection.sendall(b"!")


def test_a_listener_that_closes_resets_nobody() -> None:
    addresses, stop = [("127.0.0.1", 1)], threading.Event()
    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(ask, addresses, stop) for _ in range(8)]
        for _ in range(CLOSES):
            with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
                listener.setblocking(False)
                addresses.append(listener.getsockname())
                end = time.monotonic() + 0.02
                while time.monotonic() < end:
                    serve(listener)
                stop_accepting(listener)  # without it 10 to 20 are reset
                serve(listener)
        stop.set()
        ends = sum((client.result() for client in clients), Counter[str]())
    print(dict(ends))
    assert ends["answered"] > CLOSES
    assert ends["reset"] == ends["closed"] == 0
