"""The event loop of every process: uvloop's, which looks names up and connects in another way.

uvloop looks names up in four threads. Without a name server a lookup lasts 10 s or more: others
wait for a thread, and the process for all of them when it exits. It tries the addresses of a name
one after the other: one that does not respond, such as that of a machine that is down, uses the
whole time limit of a connect.
"""

import asyncio
import contextlib
import functools
import socket
import sys
import threading
from typing import Any

if sys.platform == "win32":
    from asyncio import SelectorEventLoop as Loop
else:
    from uvloop import Loop

#: Time until the next address is tried alongside: the minimum of RFC 8305, section 8, since a
#: connect to Redis has 0.5 s in all.
ATTEMPT_DELAY_SECONDS = 0.1


class EventLoop(Loop):
    """Looks each name up once at a time, and connects as in RFC 8305, "Happy Eyeballs"."""

    def __init__(self) -> None:
        super().__init__()
        self.lookups: dict[tuple[Any, ...], asyncio.Future[list[Any]]] = {}

    async def getaddrinfo(
        self,
        host: Any,
        port: Any,
        *,
        family: int = 0,
        type: int = 0,  # noqa: A002 - its name in asyncio
        proto: int = 0,
        flags: int = 0,
    ) -> list[Any]:
        """Return the addresses of a name. Callers that ask at the same time share a lookup."""
        question = (host, port, family, type, proto, flags)
        with contextlib.suppress(socket.gaierror):
            return socket.getaddrinfo(*question[:-1], flags | socket.AI_NUMERICHOST)
        lookup = self.lookups.get(question)
        if lookup is None:
            lookup = self._look_up(question)
            self.lookups[question] = lookup
        return await asyncio.shield(lookup)

    def _look_up(self, question: tuple[Any, ...]) -> asyncio.Future[list[Any]]:
        lookup: asyncio.Future[list[Any]] = self.create_future()

        def finish(done: asyncio.Future[list[Any]]) -> None:
            del self.lookups[question]
            if not done.cancelled():
                done.exception()  # retrieved, or asyncio would log it

        lookup.add_done_callback(finish)
        # The process does not wait for such a thread when it exits.
        threading.Thread(target=_resolve, args=(self, question, lookup), daemon=True).start()
        return lookup

    async def create_connection(
        self, protocol_factory: Any, host: Any = None, port: Any = None, **options: Any
    ) -> Any:
        """Connect to the first address that accepts. Raises `OSError` if none does."""
        create = super().create_connection
        if host is None or {"sock", "local_addr"} & options.keys():
            return await create(protocol_factory, host, port, **options)
        lookup = {name: options.pop(name, 0) for name in ("family", "proto", "flags")}
        addresses = await self.getaddrinfo(host, port, type=socket.SOCK_STREAM, **lookup)
        # An empty name is asyncio's way to verify no name.
        if options.get("ssl") and options.get("server_hostname") is None:
            options["server_hostname"] = host
        connected = await connect_to_any(addresses)
        try:
            return await create(protocol_factory, sock=connected, **options)
        except BaseException:
            connected.close()
            raise


def _resolve(loop: EventLoop, question: tuple[Any, ...], lookup: asyncio.Future[list[Any]]) -> None:
    """Look a name up, in a thread."""
    try:
        set_outcome = functools.partial(_set, lookup, socket.getaddrinfo(*question), None)
    except Exception as error:  # noqa: BLE001 - for the callers
        set_outcome = functools.partial(_set, lookup, [], error)
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(set_outcome)


def _set(lookup: asyncio.Future[list[Any]], found: list[Any], error: Exception | None) -> None:
    if lookup.done():
        return
    if error is None:
        lookup.set_result(found)
    else:
        lookup.set_exception(error)


async def connect_to_any(addresses: list[Any]) -> socket.socket:
    """Return a socket that is connected to one of the results of `getaddrinfo`.

    Raises `OSError`, that of the last attempt, if none accepts.
    """
    waiting = list(addresses)
    attempts: set[asyncio.Task[socket.socket]] = set()
    failure: BaseException = OSError("the name has no address")
    try:
        while waiting or attempts:
            if waiting:
                attempts.add(asyncio.create_task(_connect(*waiting.pop(0))))
            delay = ATTEMPT_DELAY_SECONDS if waiting else None
            await asyncio.wait(attempts, timeout=delay, return_when=asyncio.FIRST_COMPLETED)
            for attempt in [each for each in attempts if each.done()]:
                attempts.remove(attempt)
                error = attempt.exception()
                if error is None:
                    return attempt.result()
                failure = error
    finally:
        for attempt in attempts:
            _abandon(attempt)
    raise failure


async def _connect(family: int, kind: int, protocol: int, _: str, address: Any) -> socket.socket:
    connecting = socket.socket(family, kind, protocol)
    try:
        connecting.setblocking(False)
        connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(connecting, address)
    except BaseException:
        connecting.close()
        raise
    return connecting


def _abandon(attempt: asyncio.Task[socket.socket]) -> None:
    """Cancel an attempt, or close its connection."""
    if not attempt.cancel() and attempt.exception() is None:
        attempt.result().close()
