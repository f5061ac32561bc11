"""The state that a server shares with its connections: uvicorn's, and our own."""

from collections.abc import Callable

from uvicorn.server import ServerState

from app.settings import Settings


class ServiceState(ServerState):
    """The state of `ServiceServer`."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        #: Whether this worker stops, alone or with the pod: every response closes its connection.
        self.is_retiring = False
        #: Cancel the handlers of WebSockets whose clients have left.
        self.cancel_left_handlers: set[Callable[[], None]] = set()
