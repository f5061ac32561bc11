"""A TCP proxy that is slow, that cuts connections, or that leads to another server meanwhile."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

CHUNK_BYTES = 4096


class TcpProxy:
    """Forwards connections to a port of the loopback interface. Its attributes may be changed."""

    def __init__(self, target: int, host: str = "127.0.0.1") -> None:
        #: New connections lead there; those that are open do not move.
        self.target = target
        #: Limit to the server, of all connections together; 0 is none.
        self.bytes_per_second = 0
        #: Limit to each client; 0 is none.
        self.response_bytes_per_second = 0
        #: A connection is cut after this number of bytes to the server; 0 is never.
        self.cut_after_bytes = 0
        self.drops_responses = False
        self.connections = 0
        #: Bytes to the server, over all connections.
        self.sent = 0
        #: Parts in which these came: the round trips of a client that waits for each response.
        self.requests = 0
        self.lock = threading.Lock()
        self.sockets: list[socket.socket] = []
        self.threads: list[threading.Thread] = []
        self.listener = socket.create_server((host, 0))
        self.port: int = self.listener.getsockname()[1]
        self.url = f"redis://{host}:{self.port}/0"

    def accept(self) -> None:
        """Serve until the listener is closed."""
        with contextlib.suppress(OSError):
            while True:
                # A small buffer, so that a slow link looks slow to the client as well.
                self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, CHUNK_BYTES)
                client, _ = self.listener.accept()
                self.connections += 1
                server = socket.create_connection(("127.0.0.1", self.target))
                self.sockets += [client, server]
                for forward, ends in (
                    (self.to_server, (client, server)),
                    (self.to_client, (server, client)),
                ):
                    thread = threading.Thread(target=forward, args=ends, daemon=True)
                    thread.start()
                    self.threads.append(thread)

    def close(self) -> None:
        """Cut all connections, and wait until nothing is forwarded any more."""
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for each in self.sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(10)

    def to_server(self, client: socket.socket, server: socket.socket) -> None:
        sent = 0
        with contextlib.suppress(OSError), client, server:
            while data := client.recv(CHUNK_BYTES):
                self.throttle(len(data))
                server.sendall(data)
                sent += len(data)
                if self.cut_after_bytes and sent > self.cut_after_bytes:
                    break
            server.shutdown(socket.SHUT_RDWR)

    def throttle(self, number: int) -> None:
        with self.lock:
            self.sent += number
            self.requests += 1
            if self.bytes_per_second:
                time.sleep(number / self.bytes_per_second)

    def to_client(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, server:
            while data := server.recv(CHUNK_BYTES):
                if self.drops_responses:
                    break
                if self.response_bytes_per_second:
                    time.sleep(len(data) / self.response_bytes_per_second)
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def proxying(target: int, host: str = "127.0.0.1") -> Iterator[TcpProxy]:
    """Run a proxy to this port for the duration of the block; it listens on `host`."""
    proxy = TcpProxy(target, host)
    threading.Thread(target=proxy.accept, daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.close()


@contextlib.contextmanager
def silent_listener(port: int = 0, host: str = "127.0.0.1") -> Iterator[int]:
    """Yield a port whose backlog is full: a connect waits, as for a host behind a packet filter."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind((host, port))
        listener.listen(0)
        for client in (first, second):
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]
