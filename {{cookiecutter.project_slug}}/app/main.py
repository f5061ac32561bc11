"""The application: middleware, error handlers, routes. The server runs `app.main:app`."""

from collections.abc import Sequence
from typing import Any

from fastapi.params import Depends
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from app import lifecycle
from app.conversations.router import router as conversations_router  # conversations
from app.jobs.router import router as jobs_router  # jobs
from app.lifespan import WarmUp, open_state
from app.payments.router import router as payments_router  # example
from app.settings import Settings, load_settings
from app.storage.replica import HEADER as WRITE_POSITION
from app.web import health, problems
from app.web.application import TELEMETRY, Service
from app.web.quick_route import QuickRoute

#: The responses that any route may have, see app/web/limits.py.
COMMON_RESPONSES = problems.problem_responses(408, 413, 431, 500, 503, 504)


def create_app(
    settings: Settings, warm_ups: Sequence[WarmUp] = (), dependencies: Sequence[Depends] = ()
) -> Service:
    """Return the application. It opens nothing before its lifespan starts.

    Every route has the `dependencies`, for example authentication, except for the probes, `/`, and
    the API documentation, which a browser loads without a token.
    """
    app = Service(
        title=settings.service_name,
        version=settings.service_version,
        lifespan=lambda _: open_state(settings, warm_ups, lifecycle.PROCESS),
        middleware=_middleware(settings),
        responses=COMMON_RESPONSES,
        openapi_url="/openapi.json" if settings.docs_enabled else None,  # /docs and /redoc too
        telemetry=TELEMETRY,
        mandatory_dependencies=dependencies,
    )
    app.state.settings = settings
    app.state.lifecycle = lifecycle.PROCESS
    problems.install_handlers(app)

    async def describe() -> dict[str, str]:
        """Return the name and version of the service."""
        return {"service": settings.service_name, "version": settings.service_version}

    app.router.add_api_route("/", describe, tags=["service"], route_class_override=QuickRoute)
    app.include_router(health.router)
    app.include_router(payments_router)  # example
    app.include_router(jobs_router)  # jobs
    app.include_router(conversations_router)  # conversations
    return app


def _middleware(settings: Settings) -> list[Middleware]:
    """Return the middleware inside of `RequestMiddleware`, outermost first."""
    middleware = []
    if settings.cors_allow_origins:
        options: dict[str, Any] = {
            "allow_origins": settings.cors_allow_origins,
            "allow_methods": ["*"],
            "allow_headers": ["*"],
            "expose_headers": ["X-Request-ID", *([WRITE_POSITION] if settings.has_replica else [])],
        }
        middleware.append(Middleware(CORSMiddleware, **options))
    return middleware


app = create_app(load_settings())
