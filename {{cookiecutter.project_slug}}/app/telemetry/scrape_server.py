"""The HTTP server of the metrics process: a thread for each connection, and few of them."""

import contextlib
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from socketserver import TCPServer
from typing import Any

from prometheus_client.exposition import ThreadingWSGIServer, _SilentHandler

from app.setting_types import HostPort

#: Maximum number of connections, and so of threads.
MAX_CONNECTIONS = 32
#: Time limit for a connection, from its start to the end of its response.
CONNECTION_SECONDS = 30.0

WSGIApp = Callable[[dict[str, Any], Any], Iterable[bytes]]
logger = logging.getLogger("app.metrics")


class ScrapeHandler(_SilentHandler):
    """One connection, with one request."""

    server: "ScrapeServer"
    connection: socket.socket

    def parse_request(self) -> bool:
        """Parse a request whose first line has arrived.

        One without a version, which is HTTP/0.9 or cut off, gets no response: from Python 3.14 on
        wsgiref raises `AttributeError` for it.
        """
        self.server.mark_active(self.connection)
        is_valid = super().parse_request()
        return is_valid and self.request_version != "HTTP/0.9"


class ScrapeServer(ThreadingWSGIServer):
    """Serves a WSGI application to scrapers.

    A connection over the limit closes the oldest one, preferably one without a request. So idle
    clients, and clients that do not read, keep no scraper from its metrics.
    """

    request_queue_size = 128

    def __init__(self, address: HostPort, app: WSGIApp) -> None:
        """Listen. Raises `OSError` if that fails."""
        self.address_family = address.family
        self.lock = threading.Lock()
        # By age, with the time of their start
        self.idle: dict[socket.socket, float] = {}
        self.active: dict[socket.socket, float] = {}
        super().__init__((address.host, address.port), ScrapeHandler)
        self.set_app(app)

    def server_bind(self) -> None:
        """Bind without a name server, unlike `HTTPServer`.

        That resolves the name of its address, for which the start waited 25 s if no name server
        responded.
        """
        TCPServer.server_bind(self)
        self.server_name = str(self.server_address[0])
        self.server_port = int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own."""
        with self.lock:
            if len(self.idle) + len(self.active) >= MAX_CONNECTIONS:
                self._shut_down(next(iter(self.idle or self.active)))
            self.idle[request] = time.monotonic()
        super().process_request(request, client_address)

    def mark_active(self, connection: socket.socket) -> None:
        """Record that a connection has a request."""
        with self.lock:
            if connection in self.idle:
                self.active[connection] = self.idle.pop(connection)

    def service_actions(self) -> None:
        """Shut down connections that exceed their time limit. Called twice a second."""
        oldest_start = time.monotonic() - CONNECTION_SECONDS
        with self.lock:
            for connection, start in [*self.idle.items(), *self.active.items()]:
                if start < oldest_start:
                    self._shut_down(connection)

    def _shut_down(self, connection: socket.socket) -> None:
        """Have the thread of a connection end: its next read or write fails."""
        self.idle.pop(connection, None)
        self.active.pop(connection, None)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    def close_request(self, request: Any) -> None:
        """Close a connection that is served."""
        with self.lock:
            self.idle.pop(request, None)
            self.active.pop(request, None)
            super().close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error, except for a lost connection. `socketserver` would print it."""
        if not isinstance(sys.exception(), OSError):
            logger.exception("metrics request failed")
