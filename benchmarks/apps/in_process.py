"""Send requests to applications within this process, through uvicorn's protocol but no socket.

`python -m in_process NUMBER APP:ROUTE ...` serves so many requests of each route. It forks before
and after them: benchmarks/instructions.py reads from the exits of these children how many
instructions the requests in between took.
"""

import asyncio
import contextlib
import gc
import importlib
import itertools
import os
import sys
from typing import Any
from uuid import uuid4

import uvloop
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

WARM_UP_REQUESTS = 60
#: For timers that must not run.
FOREVER_SECONDS = 1e6
PAYMENT = b'{"amount": 1250, "currency": "EUR", "reference": "order-1"}'
ROUTES = {
    "small": ("GET", "/"),
    "describe": ("GET", "/api/describe"),
    "query": ("GET", "/stored/{payment}"),
    "plain": ("GET", "/plain/stored/{payment}"),
    "post": ("POST", "/payments"),
    "first": ("GET", "/resource0/item0/5"),
    "last": ("GET", "/resource9/item9/5"),
}
INSERT = "insert into payments (amount, currency, reference) values (1, 'EUR', 'a') returning *"


class ResponseTransport(asyncio.Transport):
    """A transport that completes a future when it has received a body of JSON, or an error."""

    def __init__(self) -> None:
        """Expect a response."""
        super().__init__()
        self.is_complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.received = b""

    def expect(self) -> "asyncio.Future[None]":
        """Forget the response before; return the future of the next one."""
        self.received = b""
        self.is_complete = asyncio.get_running_loop().create_future()
        return self.is_complete

    def write(self, data: Any) -> None:
        """Receive a part of a response."""
        self.received += bytes(data)
        is_last = self.received.endswith(b"}") or not self.received.startswith(b"HTTP/1.1 2")
        if is_last and not self.is_complete.done():
            self.is_complete.set_result(None)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return the addresses of both ends."""
        addresses = {"sockname": ("127.0.0.1", 8000), "peername": ("127.0.0.1", 50000)}
        return addresses.get(name, default)

    def is_closing(self) -> bool:
        """Return False."""
        return False

    def get_write_buffer_size(self) -> int:
        """Return 0: everything is received at once."""
        return 0

    def pause_reading(self) -> None:
        """Do nothing."""

    def resume_reading(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Client:
    """Sends requests of one route, over one connection."""

    def __init__(self, protocol: asyncio.Protocol, route: str, payment: str) -> None:
        """`payment` is the ID of the payment that is read."""
        self.protocol = protocol
        self.transport = ResponseTransport()
        protocol.connection_made(self.transport)
        self.method, path = ROUTES[route]
        self.path = path.format(payment=payment)
        self.keys = (f"{uuid4().hex}-{number}" for number in itertools.count())

    def request(self) -> bytes:
        """Return the bytes of a new request."""
        head = f"{self.method} {self.path} HTTP/1.1\r\nHost: 127.0.0.1:8000\r\n"
        if self.method == "GET":
            return f"{head}\r\n".encode()
        fields = f"Content-Type: application/json\r\nContent-Length: {len(PAYMENT)}\r\n"
        return f"{head}{fields}Idempotency-Key: {next(self.keys)}\r\n\r\n".encode() + PAYMENT

    async def send(self, number: int) -> None:
        """Send requests, each after the response to the one before. All must succeed."""
        for _ in range(number):
            response = self.transport.expect()
            self.protocol.data_received(self.request())
            await response
            if not self.transport.received.startswith(b"HTTP/1.1 20"):
                sys.exit(f"{self.method} {self.path}: {self.transport.received[:200]!r}")
            # The task of the request ends.
            await asyncio.sleep(0)


def prepare_service() -> None:
    """Import the service such that timers, which depend on the clock, take no part."""
    metrics: Any = importlib.import_module("app.telemetry.http_metrics")
    assert metrics.FLUSH_SECONDS < FOREVER_SECONDS
    metrics.FLUSH_SECONDS = FOREVER_SECONDS


def make_protocol(app: Any, state: dict[str, Any]) -> asyncio.Protocol:
    """Return the protocol of a connection, as the application's own server has it."""
    if not hasattr(app, "request_middleware"):
        return HttpToolsProtocol(config_of(app), ServerState(), state)
    protocol: Any = importlib.import_module("app.serving.http_protocol")
    server: Any = importlib.import_module("app.serving.state")
    config = config_of(app.request_middleware)
    made: asyncio.Protocol = protocol.HttpRequestProtocol(
        config, server.ServiceState(app.state.settings), state
    )
    return made


def config_of(app: Any) -> Config:
    """Return the options of uvicorn that both workers set."""
    config = Config(app, interface="asgi3", access_log=False, server_header=False, log_config=None)
    config.load()
    return config


def find_app(name: str) -> Any:
    """Return the application of a module, such as `bare` or `package.module/factory`."""
    module, _, factory = name.partition("/")
    imported: Any = importlib.import_module(module)
    return getattr(imported, factory)() if factory else imported.app


async def store_payment() -> str:
    """Store a payment; return its ID."""
    asyncpg: Any = importlib.import_module("asyncpg")
    connection = await asyncpg.connect(os.environ["DATABASE_URL"])
    payment = await connection.fetchval(INSERT)
    await connection.close()
    return str(payment)


def mark() -> None:
    """Fork a child that exits at once: it has counted what this process has counted so far."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


async def serve(number: int, names: list[str]) -> None:
    """Serve the requests of each route, between two marks; exit without a shutdown."""
    payment = ""
    if any(name.endswith((":query", ":plain")) for name in names):
        payment = await store_payment()
    states: dict[str, Any] = {}
    # Never closed: this process exits without it.
    lifespans = contextlib.AsyncExitStack()
    for name in names:
        app_name, _, route = name.partition(":")
        app = find_app(app_name)
        if app_name not in states:
            state = await lifespans.enter_async_context(app.router.lifespan_context(app))
            states[app_name] = dict(state or {})
            await stop_background_tasks()
        client = Client(make_protocol(app, states[app_name]), route, payment)
        await client.send(WARM_UP_REQUESTS)
        # As the service does after its start.
        gc.collect()
        gc.freeze()
        mark()
        await client.send(number)
        mark()
    os._exit(0)


async def stop_background_tasks() -> None:
    """Cancel all other tasks: their work depends on the time, not on the requests."""
    await asyncio.sleep(0.1)
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def main() -> None:
    """Serve the routes of the arguments."""
    number = int(sys.argv[1])
    if os.environ.get("ACCESS_LOG_FLUSH_MS"):
        prepare_service()
    uvloop.run(serve(number, sys.argv[2:]))


if __name__ == "__main__":
    main()
