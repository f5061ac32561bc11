"""The application: middleware, error handlers, routes. The server runs `app.main:app`."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from fastapi.telemetry._asgi import ExceptionTelemetryMiddleware
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from app import lifecycle
from app.lifespan import WarmUp, open_state
from app.payments.router import router as payments_router  # example
from app.settings import Settings, load_settings
from app.web import cors, health, problems
from app.web.middleware import RequestMiddleware


class Service(FastAPI):
    """FastAPI inside of `RequestMiddleware`.

    Middleware that is added to it, or patched into it by an agent, is inside too. So every response
    has a request ID, an access line and a count.
    """

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
        return RequestMiddleware(
            super().__call__, settings, process, self.router, middleware_for_cors
        )


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


#: FastAPI's own telemetry. What is enabled is looked up per request.
TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}
#: The responses that any route may have, see app/web/limits.py.
COMMON_RESPONSES = problems.problem_responses(408, 413, 431, 500, 503, 504)


def create_app(settings: Settings, warm_ups: Sequence[WarmUp] = ()) -> Service:
    """Return the application. It opens nothing before its lifespan starts."""
    app = Service(
        title=settings.service_name,
        version=settings.service_version,
        lifespan=lambda _: open_state(settings, warm_ups, lifecycle.PROCESS),
        middleware=_middleware(settings),
        responses=COMMON_RESPONSES,
        openapi_url="/openapi.json" if settings.docs_enabled else None,  # /docs and /redoc too
        telemetry=TELEMETRY,
    )
    app.state.settings = settings
    app.state.lifecycle = lifecycle.PROCESS
    problems.install_handlers(app)

    @app.get("/", tags=["service"])
    async def describe() -> dict[str, str]:
        """Return the name and version of the service."""
        return {"service": settings.service_name, "version": settings.service_version}

    app.include_router(health.router)
    app.include_router(payments_router)  # example
    return app


def _middleware(settings: Settings) -> list[Middleware]:
    """Return the middleware inside of `RequestMiddleware`, outermost first."""
    middleware = []
    if settings.cors_allow_origins:
        options: dict[str, Any] = {
            "allow_origins": settings.cors_allow_origins,
            "allow_methods": ["*"],
            "allow_headers": ["*"],
            "expose_headers": ["X-Request-ID"],
        }
        middleware.append(Middleware(CORSMiddleware, **options))
    return middleware


app = create_app(load_settings())
