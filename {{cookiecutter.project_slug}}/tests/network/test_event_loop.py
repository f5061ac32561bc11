"""The event loop: lookups that are shared, and connections to any address (RFC 8305, section 5)."""

import asyncio
import gc
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from app.network.event_loop import EventLoop, connect_to_any
from scripts.dev_services import free_port
from tests.tcp_proxy import silent_listener


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": EventLoop}


@pytest.fixture(autouse=True)
def no_leak() -> Iterator[None]:
    """Fail if a socket is not closed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
        gc.collect()


@pytest.fixture
def live_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def silent_port() -> Iterator[int]:
    with silent_listener() as port:
        yield port


def addresses(*ports: int) -> list[Any]:
    """Return what getaddrinfo(3) returns for a name with these addresses."""
    kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
    return [(*kind, ("127.0.0.1", port)) for port in ports]


async def test_first_address_that_accepts_is_connected(live_port: int, silent_port: int) -> None:
    for ports in ([live_port], [silent_port, live_port], [free_port(), silent_port, live_port]):
        with await connect_to_any(addresses(*ports)) as connected:
            assert connected.getpeername() == ("127.0.0.1", live_port)


async def test_address_that_accepts_keeps_others_from_being_tried(live_port: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.3)
        ports = (live_port, other.getsockname()[1])
        with await connect_to_any(addresses(*ports)), pytest.raises(TimeoutError):
            other.accept()


async def test_refused_connections_are_the_error(silent_port: int) -> None:
    with pytest.raises(ConnectionRefusedError):
        await connect_to_any(addresses(free_port(), free_port()))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await connect_to_any(addresses(free_port(), silent_port, free_port()))
    with pytest.raises(OSError, match="no address"):
        await connect_to_any([])


async def test_connects_cancelled_at_any_moment_leak_no_socket(live_port: int) -> None:
    for number in range(60):
        task = asyncio.create_task(connect_to_any(addresses(live_port, live_port)))
        for _ in range(number % 6):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result().close()


class Lookups:
    """Lookups of names that last until they are released."""

    def __init__(self, port: int) -> None:
        self.found = addresses(port)
        self.names: list[str] = []
        self.released = threading.Event()
        self.original = socket.getaddrinfo

    def __call__(self, host: str, *arguments: Any) -> list[Any]:
        if arguments[-1] & socket.AI_NUMERICHOST:
            return self.original(host, *arguments)
        self.names.append(host)
        self.released.wait(30)
        if host == "unknown.test":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return self.found


@pytest.fixture
def lookups(live_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lookups]:
    found = Lookups(live_port)
    monkeypatch.setattr(socket, "getaddrinfo", found)
    yield found
    found.released.set()


async def test_concurrent_lookups_of_a_name_are_one(lookups: Lookups, live_port: int) -> None:
    """A caller that is cancelled does not end it, and an address needs none."""
    loop = asyncio.get_running_loop()

    async def connect(host: str) -> None:
        transport, _ = await loop.create_connection(asyncio.Protocol, host, live_port)
        transport.close()

    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await connect("db.test")
    waiting = [asyncio.create_task(connect("db.test")) for _ in range(50)]
    unknown = asyncio.create_task(connect("unknown.test"))
    await connect("127.0.0.1")
    await asyncio.sleep(0.05)
    assert lookups.names == ["db.test", "unknown.test"]
    lookups.released.set()
    await asyncio.gather(*waiting)
    with pytest.raises(socket.gaierror):
        await unknown
    await connect("db.test")
    assert len(lookups.names) == 3


def test_closed_loop_does_not_wait_for_a_lookup(lookups: Lookups) -> None:
    loop = EventLoop()
    start = time.monotonic()

    async def look_up() -> None:
        async with asyncio.timeout(0.05):
            await loop.getaddrinfo("db.test", 1)

    with pytest.raises(TimeoutError):
        loop.run_until_complete(look_up())
    loop.close()
    # 30 s if it waited.
    assert time.monotonic() - start < 10


async def client_hello(**options: Any) -> bytes:
    """Return the first message of a connection with TLS to the name localhost."""
    context = ssl.create_default_context()
    context.check_hostname = False
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        connecting = asyncio.create_task(
            loop.create_connection(
                asyncio.Protocol, "localhost", port, family=socket.AF_INET, ssl=context, **options
            )
        )
        with (await asyncio.to_thread(listener.accept))[0] as connection:
            message = await asyncio.to_thread(connection.recv, 65_536)
    with pytest.raises((OSError, ssl.SSLError)):
        await connecting
    return message


async def test_server_name_of_tls_is_the_host_unless_given() -> None:
    """RFC 6066, section 3. An empty name sends none, as in asyncio."""
    assert b"localhost" in await client_hello()
    assert b"other.test" in await client_hello(server_hostname="other.test")
    assert b"localhost" not in await client_hello(server_hostname="")
