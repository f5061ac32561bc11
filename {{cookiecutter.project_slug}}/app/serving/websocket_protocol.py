"""A WebSocket on one connection: uvicorn's, which can be told to close in any state."""

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol


class ServiceWebSocket(WebSocketsSansIOProtocol):
    """One connection. Uvicorn's raises, and so ends the worker, if its client has closed but does not read on."""

    def shutdown(self) -> None:
        """Close with 1012, service restart, what is not closing already."""
        if not self.transport.is_closing():
            super().shutdown()
