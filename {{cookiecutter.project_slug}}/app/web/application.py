"""The application class: FastAPI inside of the request middleware."""

from collections.abc import Awaitable, Sequence
from functools import cached_property
from typing import Any

import fastapi.applications
import starlette.applications
from fastapi import APIRouter, FastAPI
from fastapi.params import Depends
from fastapi.telemetry import TelemetryConfig
from fastapi.telemetry._asgi import ExceptionTelemetryMiddleware
from starlette.applications import Starlette
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from app.web import cors, problems
from app.web.directory import use_directory
from app.web.document import describe_authentication
from app.web.middleware import RequestMiddleware
from app.web.quick_route import is_defined_in

#: FastAPI's own telemetry. What is enabled is looked up per request.
TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}


class Service(FastAPI):
    """FastAPI inside of `RequestMiddleware`.

    Middleware that is added to it, or patched into it by an agent, is inside too. So every response
    has a request ID, an access line and a count.
    """

    def __init__(self, *, mandatory_dependencies: Sequence[Depends] = (), **options: Any) -> None:
        """Routes that are added after the first router have the mandatory dependencies."""
        super().__init__(**options)
        use_directory(self)
        self.mandatory_dependencies = list(mandatory_dependencies)

    def include_router(self, router: APIRouter, **options: Any) -> None:
        """Include a router. The first is that of the probes, for which kubelet sends no token."""
        super().include_router(router, **options)
        self.router.dependencies = self.mandatory_dependencies

    def openapi(self) -> dict[str, Any]:
        """Return the API document."""
        is_new = self.openapi_schema is None
        document = super().openapi()
        if is_new:
            is_on = self.state.settings.auth_issuer is not None
            describe_authentication(document, is_on)
        return document

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or the lifespan: ASGI."""
        await self.request_middleware(scope, receive, send)

    @cached_property
    def request_middleware(self) -> RequestMiddleware:
        """The outermost middleware. The first call makes it, in the worker: it has metrics."""
        self.middleware_stack = _without_idle_layers(self.build_middleware_stack())
        settings = self.state.settings
        process = self.state.lifecycle
        middleware_for_cors = cors.find_middleware(self)
        serve = self._serve_request if _is_call_idle() else super().__call__
        return RequestMiddleware(serve, settings, process, self.router, middleware_for_cors)

    def _serve_request(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Do what is left of FastAPI's `__call__` while its telemetry is off."""
        if scope["type"] == "lifespan" or self.middleware_stack is None:
            return super().__call__(scope, receive, send)
        if self.root_path:
            scope["root_path"] = self.root_path
        scope["app"] = self
        return self.middleware_stack(scope, receive, send)


def _is_call_idle() -> bool:
    """Return whether FastAPI's and Starlette's `__call__` add nothing to the middleware's.

    Agents such as Sentry's replace them, to see all requests.
    """
    is_fastapis = is_defined_in(fastapi.applications, FastAPI.__call__)
    is_starlettes = is_defined_in(starlette.applications, Starlette.__call__)
    return is_fastapis and is_starlettes and not any(TELEMETRY.values())


def _without_idle_layers(stack: ASGIApp) -> ASGIApp:
    """Remove the outermost layers that do nothing here, which cost 3 % of a small request.

    Starlette's responds 500, as `RequestMiddleware` does, unless a team has registered a handler of
    `Exception` or of 500. FastAPI's adds exceptions to its telemetry.
    """
    if isinstance(stack, ServerErrorMiddleware):
        has_own_handler = stack.handler not in (None, problems.respond_to_bug)
        if not has_own_handler and not stack.debug:
            stack = stack.app
    if isinstance(stack, ExceptionTelemetryMiddleware) and not any(TELEMETRY.values()):
        stack = stack.app
    return stack
