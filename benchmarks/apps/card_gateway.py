"""A gateway of cards that accepts each charge after a delay: `python card_gateway.py PORT SECONDS`.

It reads no more of a request than its end, so that it is not what a benchmark measures.
"""

import asyncio
import sys
from typing import Any

import uvloop

LENGTH = b"content-length:"
RESPONSE = b"HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


class Gateway(asyncio.Protocol):
    """One connection."""

    received = b""

    def __init__(self, seconds: float) -> None:
        """`seconds`: the time from a request to its response."""
        self.seconds = seconds

    def connection_made(self, transport: Any) -> None:
        """Keep the connection."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Respond to each request that is complete."""
        self.received += data
        while (end := self._end_of_request()) is not None:
            self.received = self.received[end:]
            loop = asyncio.get_running_loop()
            loop.call_later(self.seconds, self.transport.write, RESPONSE)

    def _end_of_request(self) -> int | None:
        """Return the length of the first request, None if it is not complete."""
        headers, separator, body = self.received.partition(b"\r\n\r\n")
        if not separator:
            return None
        lengths = [line for line in headers.lower().split(b"\r\n") if line.startswith(LENGTH)]
        length = int(lengths[0].removeprefix(LENGTH)) if lengths else 0
        return len(headers + separator) + length if len(body) >= length else None


async def main() -> None:
    """Serve until the process is stopped."""
    seconds = float(sys.argv[2])
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Gateway(seconds), "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
