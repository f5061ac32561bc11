"""Users: each sends requests over a connection of its own, one after another.

Plain sockets, since the load must not compete with the worker for the CPU: with 100 connections
httpx needs 11 ms of CPU for a request, and this 0.15 ms.
"""

import asyncio
import time
from collections.abc import Sequence
from email.parser import BytesHeaderParser
from typing import NamedTuple

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Request(NamedTuple):
    """A request. A body is JSON."""

    path: str
    body: bytes = b""
    method: str = "POST"


class Response(NamedTuple):
    """The part of a response that a recipe needs."""

    status: int
    location: str
    body: bytes
    seconds: float


class RequestError(Exception):
    """A request got another status than 2xx, or no response."""


class Users:
    """A number of users of the API."""

    def __init__(self, port: int, number: int) -> None:
        self.port = port
        self.number = number
        self.idle: list[Connection] = []

    async def send_all(self, requests: Sequence[Request]) -> list[Response]:
        """Send the requests: each user sends its next one as soon as its last has a response.

        Raises `RequestError` for the first one that fails.
        """
        remaining = iter(requests)
        responses: list[Response] = []

        async def act() -> None:
            for request in remaining:
                response = await self.send(request)
                responses.append(response)

        users = [asyncio.create_task(act()) for _ in range(self.number)]
        try:
            await asyncio.gather(*users)
        finally:
            for user in users:
                user.cancel()
        return responses

    async def send(self, request: Request) -> Response:
        """Send one request. Raises `RequestError`."""
        start = time.perf_counter()
        try:
            connection = self.idle.pop() if self.idle else await self._connect()
            status, headers, body = await self._exchange(connection, request)
        except (OSError, EOFError) as error:
            msg = f"{request.method} {request.path}: no response: {error!r}"
            raise RequestError(msg) from error
        if not 200 <= status < 300:
            detail = body[:200].decode(errors="replace")
            msg = f"{request.method} {request.path}: {status} {detail}"
            raise RequestError(msg)
        seconds = time.perf_counter() - start
        return Response(status, headers.get("location", ""), body, seconds)

    async def _exchange(
        self, connection: Connection, request: Request
    ) -> tuple[int, dict[str, str], bytes]:
        reader, writer = connection
        headers = [
            f"{request.method} {request.path} HTTP/1.1",
            "Host: localhost",
            f"Content-Length: {len(request.body)}",
        ]
        if request.body:
            headers.append("Content-Type: application/json")
        writer.write("\r\n".join(headers).encode() + b"\r\n\r\n" + request.body)
        status_line = await reader.readline()
        received = BytesHeaderParser().parsebytes(await reader.readuntil(b"\r\n\r\n"))
        fields = {name.lower(): str(value) for name, value in received.items()}
        body = await reader.readexactly(int(fields.get("content-length", 0)))
        if fields.get("connection") == "close":
            writer.close()
        else:
            self.idle.append(connection)
        return int(status_line.split()[1]), fields, body

    async def _connect(self) -> Connection:
        return await asyncio.open_connection("127.0.0.1", self.port)

    def close(self) -> None:
        """Close the connections."""
        for _, writer in self.idle:
            writer.close()
