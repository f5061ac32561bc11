"""WebSocket connections: uvicorn's, safe to shut down in any state."""

from asyncio import BaseTransport

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from app.web.proxies import client_address


class ServiceWebSocket(WebSocketsSansIOProtocol):
    """One WebSocket connection.

    uvicorn's raises, and so stops the worker, if the client has closed but does not read on.
    """

    def connection_made(self, transport: BaseTransport) -> None:
        """Accept a connection; a client of IPv4 has an IPv4 address, also on a socket of IPv6."""
        super().connection_made(transport)
        self.client = client_address(self.client)

    def shutdown(self) -> None:
        """Close with 1012, service restart, unless the connection is closing already."""
        if not self.transport.is_closing():
            super().shutdown()
