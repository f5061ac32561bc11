"""The application: middleware, error handlers, routes. The server runs `app.main:app`."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.types import ASGIApp

from app.lifecycle import Lifecycle
from app.lifespan import WarmUp, open_state
from app.payments.router import router as payments_router  # example
from app.settings import Settings, load_settings
from app.web import health, problems
from app.web.middleware import RequestMiddleware


class Service(FastAPI):
    """FastAPI without `ServerErrorMiddleware`: `RequestMiddleware` logs bugs and responds 500."""

    def build_middleware_stack(self) -> ASGIApp:
        """Return the middleware without the outermost, which costs 3 % of a small request."""
        stack = super().build_middleware_stack()
        return stack.app if isinstance(stack, ServerErrorMiddleware) else stack


#: The responses that any route may have, see app/web/limits.py.
COMMON_RESPONSES = problems.problem_responses(408, 413, 431, 500, 503, 504)


def create_app(settings: Settings, warm_ups: Sequence[WarmUp] = ()) -> FastAPI:
    """Return the application. It opens nothing before its lifespan starts."""
    lifecycle = Lifecycle()
    app = Service(
        title=settings.service_name,
        version=settings.service_version,
        lifespan=lambda _: open_state(settings, warm_ups, lifecycle),
        middleware=_middleware(settings),
        responses=COMMON_RESPONSES,
        openapi_url="/openapi.json" if settings.docs_enabled else None,  # /docs and /redoc too
        telemetry={"tracing": False, "metrics": False, "logs": False},  # else looked up per request
    )
    app.state.settings = settings  # the server reads these two
    app.state.lifecycle = lifecycle
    problems.install_handlers(app)

    @app.get("/", tags=["service"])
    async def describe() -> dict[str, str]:
        """Return the name and version of the service."""
        return {"service": settings.service_name, "version": settings.service_version}

    app.include_router(health.router)
    app.include_router(payments_router)  # example
    return app


def _middleware(settings: Settings) -> list[Middleware]:
    """Return the middleware, outermost first."""
    middleware = [
        Middleware(RequestMiddleware, settings=settings)  # request ID, limits, access log, metrics
    ]
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
