"""HEAD: the response of GET without its body (RFC 9110, section 9.3.2)."""

from starlette.routing import Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.web.routes import handles


async def serve_head(
    app: ASGIApp, router: Router, scope: Scope, receive: Receive, send: Send
) -> None:
    """Serve HEAD by its own route, or else by the one of GET.

    RFC 9110, section 9.1, requires both; FastAPI's routes have the methods that they declare.
    """
    get_scope = {**scope, "method": "GET"}
    if handles(router.routes, scope) or not handles(router.routes, get_scope):
        await app(scope, receive, send)
        return

    async def send_headers(message: Message) -> None:
        """Send the headers, and the end. Then `receive` reports the end of the client."""
        if message["type"] == "http.response.start":
            scope.update({**get_scope, "method": "HEAD"})  # the route, for the metrics
            await send(message)
            await send({"type": "http.response.body"})

    await app(get_scope, receive, send_headers)
