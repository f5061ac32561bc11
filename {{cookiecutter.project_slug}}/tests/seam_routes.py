"""The service with a mandatory dependency, and with routes that follow it."""

import sys

from fastapi import APIRouter, Depends, Header, WebSocket
from prometheus_client import Counter

from app.errors import ServiceError
from app.main import create_app
from app.settings import load_settings


class UnauthorizedError(ServiceError):
    """401, as an authentication of a team's own would raise it."""

    status = 401


def authenticate(authorization: str = Header("")) -> None:
    """Reject requests without a token."""
    if not authorization:
        raise UnauthorizedError("Send a token.")


app = create_app(load_settings(), dependencies=[Depends(authenticate)])
router = APIRouter(prefix="/orders")
visits = Counter("visits", "A metric at module level.")


@app.get("/on-the-application")
async def on_the_application() -> str:
    """Print a line, which is a log line, and count."""
    sys.stdout.write("printed\n")
    visits.inc()
    return "done"


@router.get("/on-a-router")
async def on_a_router() -> str:
    """Respond."""
    return "done"


@router.websocket("/websocket")
async def websocket(connection: WebSocket) -> None:
    """Accept, and close."""
    await connection.accept()
    await connection.close()


app.include_router(router)
