"""Requests that cost the lab little CPU time, which the services under load need."""

import asyncio
import contextlib


async def get_status(port: int, path: str) -> int:
    """Return the status of a GET request on a connection of its own; 0 without a response."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(writer):
            head = f"GET {path} HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n"
            writer.write(head.encode())
            response = await reader.read()
            return int(response.split(maxsplit=2)[1])
    return 0
