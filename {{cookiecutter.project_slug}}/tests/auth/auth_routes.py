"""The service with mandatory authentication, and with keys that are refreshed soon."""

from collections.abc import AsyncIterator

from fastapi import APIRouter, WebSocket
from fastapi.responses import StreamingResponse

from app.auth import keys
from app.auth.dependencies import AUTHENTICATED, Principal, require
from app.main import create_app
from app.settings import load_settings
from app.web.quick_route import QuickRoute

COOL_DOWN_SECONDS = 0.5
keys.COOL_DOWN_SECONDS = COOL_DOWN_SECONDS
keys.MIN_AGE_SECONDS = COOL_DOWN_SECONDS
keys.WAIT_SECONDS = 0.3

app = create_app(load_settings(), dependencies=[AUTHENTICATED])
router = APIRouter(prefix="/mine", route_class=QuickRoute)


@router.get("")
async def mine(principal: Principal) -> dict[str, object]:
    """Return the caller."""
    return {
        "subject": principal.subject,
        "client_id": principal.client_id,
        "scopes": sorted(principal.scopes),
    }


@router.get("/written", dependencies=[require("orders:write", "orders:read")])
async def written() -> str:
    """Require scopes."""
    return "written"


@router.get("/stream")
async def stream() -> StreamingResponse:
    """Send two parts."""

    async def parts() -> AsyncIterator[str]:
        yield "sec"
        yield "ret"

    return StreamingResponse(parts())


@router.post("/body")
async def body(value: dict[str, int]) -> dict[str, int]:
    """Return the body, by FastAPI's own handler."""
    return value


@router.get("/bug")
async def bug() -> None:
    """Raise."""
    raise RuntimeError


@router.websocket("/socket")
async def socket(connection: WebSocket) -> None:
    """Accept, and close."""
    await connection.accept()
    await connection.close()


app.include_router(router)
