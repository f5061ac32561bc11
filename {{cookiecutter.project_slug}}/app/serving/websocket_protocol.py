"""WebSocket connections: uvicorn's, safe to shut down in any state."""

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol


class ServiceWebSocket(WebSocketsSansIOProtocol):
    """One WebSocket connection.

    uvicorn's raises, and so stops the worker, if the client has closed but does not read on.
    """

    def shutdown(self) -> None:
        """Close with 1012, service restart, unless the connection is closing already."""
        if not self.transport.is_closing():
            super().shutdown()
