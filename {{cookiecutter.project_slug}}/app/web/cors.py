"""CORS headers of the responses that `CORSMiddleware` does not see.

Such as rejections, timeouts, and the 500 of a bug. Without them a browser hides the response, its
status included, from the page (Fetch Standard, section 4.9, "CORS check").
"""

from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Message, Scope


def find_middleware(app: Starlette) -> CORSMiddleware | None:
    """Return a copy of the application's middleware for CORS, the service's or a team's."""
    for each in app.user_middleware:
        options: Any = each
        if isinstance(each.cls, type) and issubclass(each.cls, CORSMiddleware):
            return each.cls(app.router, *options.args, **options.kwargs)
    return None


def add_missing_headers(cors: CORSMiddleware, scope: Scope, message: Message) -> None:
    """Add the headers of CORS to the start of a response, unless it has them."""
    headers = MutableHeaders(scope=message)
    if "access-control-allow-origin" in headers:
        return
    origin = Headers(scope=scope).get("origin")
    if origin is None:
        return
    headers.update(cors.simple_headers)
    # `simple_headers` allow every origin with `*`, unless the browser sends credentials with it.
    allows_any = cors.allow_all_origins and not cors.allow_credentials
    if not allows_any and cors.is_allowed_origin(origin):
        cors.allow_explicit_origin(headers, origin)
