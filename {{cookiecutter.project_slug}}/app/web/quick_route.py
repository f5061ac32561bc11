"""Routes at half of the cost: what FastAPI finds out for each request is decided once.

FastAPI looks for parameters, a body and security scopes per request, for the route and again for
each of its dependencies. A `QuickRoute` calls the functions by a plan instead. Opt in by router:

    router = APIRouter(prefix="/orders", route_class=QuickRoute)

The plan knows coroutine functions with parameters of the path, the query, headers and cookies, with
the `Request`, with one body of JSON, and with such dependencies, nested ones included. A route that
needs anything else, such as a form or a dependency with `yield`, is FastAPI's: slower, and the
same. So is an invalid request, and a body without `Content-Type: application/json`. Objects with a
coroutine function `__call__` count too, such as those of app/auth.

Such an object may have a `switch`: a name in the state of the process. While the state has None by
that name, the dependency has no effect, so the plan omits it unless its result is an argument.

`Directory` serves such a route without FastAPI's application around the handler, which opens three
exit stacks for dependencies with `yield` and for files, and handles exceptions a second time.
"""

import inspect
import json
from collections.abc import Callable, Coroutine
from types import FunctionType, ModuleType
from typing import Any

import starlette.routing
from fastapi import Request, Response, routing
from fastapi.datastructures import DefaultPlaceholder
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import EndpointContext, ResponseValidationError
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from fastapi.routing import APIRoute
from fastapi.utils import is_body_allowed_for_status_code
from pydantic_core import PydanticUndefined as Undefined
from starlette._exception_handler import wrap_app_handling_exceptions
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from app.web.quick_plan import Plan, Step

#: An ASGI application.
App = Callable[[Scope, Receive, Send], Coroutine[Any, Any, None]]
Handler = Callable[[Request], Coroutine[Any, Any, Response]]
Arguments = dict[str, Any] | None

_UNKNOWN_OF_ROUTE = [
    "_embed_body_fields",
    "stream_item_field",
    "is_sse_stream",
    "is_json_stream",
    "response_model_include",
    "response_model_exclude",
    "response_model_exclude_unset",
    "response_model_exclude_defaults",
    "response_model_exclude_none",
]


class QuickRoute(APIRoute):
    """A route of FastAPI whose functions are called by a plan, where that comes to the same."""

    def get_route_handler(self) -> Handler:
        """Return the function that handles a request. FastAPI calls this once per route."""
        usual = super().get_route_handler()
        # A router that includes the route adds dependencies. FastAPI has the sum of all in here.
        included: Any = routing._effective_route_context_var.get()
        is_included = included is not None and included.original_route is self
        route = included if is_included else self
        if not is_defined_in(routing, usual) or not _is_known(route):
            return usual
        plan = Plan()
        plan.add(route.dependant)
        return _QuickHandler(route, plan, usual).handle if plan.is_known else usual


class _QuickHandler:
    """Handles the requests of a route by its plan, or else as FastAPI does."""

    def __init__(self, route: Any, plan: Plan, usual: Handler) -> None:
        self.usual = usual
        self.steps = plan.steps
        self.switch, self.steps_without = plan.without_switched()
        self.has_body = route.body_field is not None
        self.dependencies = plan.dependencies
        self.known_dependencies = plan.known_dependencies
        self.overrides = route.dependency_overrides_provider
        self.field = route.response_field
        self.default_class = route.response_class.value
        self.status = route.status_code or 200
        self.path = route.path_format

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request: ASGI. Exceptions are handled as in FastAPI's application."""
        request = Request(scope, receive, send)
        try:
            response = await self._call(request)
        except Exception as error:  # noqa: BLE001 - it is raised again
            await wrap_app_handling_exceptions(raising(error), request)(scope, receive, send)
            return
        if response is None:
            await self._serve_as_usual(request)
        else:
            await response(scope, receive, send)

    async def handle(self, request: Request) -> Response:
        """Return the response. Exceptions are handled around it."""
        response = await self._call(request)
        return await self.usual(request) if response is None else response

    async def _serve_as_usual(self, request: Request) -> None:
        """Serve a request that the plan is not for, as FastAPI does."""

        async def handle(same: Request) -> Response:
            vars(same).update(vars(request))  # such as the body that was read
            return await self.usual(same)

        app = AsyncExitStackMiddleware(routing.request_response(handle))
        await app(request.scope, request._receive, request._send)

    async def _call(self, request: Request) -> Response | None:
        """Return the response of the plan; None if it is not for this request."""
        if self._is_changed(request):
            return None
        body = await _read_json(request) if self.has_body else None
        arguments = None if body is Undefined else self._read(request, body)
        if arguments is None:
            return None
        results: list[Any] = []
        for step, values in arguments:
            if values is None:
                results.append(await step.call(request))
                continue
            for name, index in step.results:
                values[name] = results[index]
            results.append(await step.call(**values))
        return self._respond(results[-1], request)

    def _is_changed(self, request: Request) -> bool:
        """Return whether the plan is not valid: a test or an integration has changed the route."""
        overrides = self.overrides is not None and self.overrides.dependency_overrides
        has_telemetry = request.scope.get("fastapi.telemetry") is not None
        return overrides or has_telemetry or self.dependencies != self.known_dependencies

    def _read(self, request: Request, body: Any) -> list[tuple[Step, Arguments]] | None:
        """Return each step with its arguments, without results; None if one is not valid.

        The arguments of a step with the request as its only argument are None.
        """
        arguments: list[tuple[Step, Arguments]] = []
        for step in self._steps(request):
            values = None
            if not step.takes_only_request:
                values = step.read_arguments(request, body)
                if values is None:
                    return None
            arguments.append((step, values))
        return arguments

    def _steps(self, request: Request) -> list[Step]:
        """Return the steps that have an effect here: all, if the state does not have the switch."""
        if self.switch is None or request.scope.get("state", {}).get(self.switch, True) is not None:
            return self.steps
        return self.steps_without

    def _respond(self, result: Any, request: Request) -> Response:
        if isinstance(result, Response):
            return result
        if self.field is None:
            response: Response = self.default_class(jsonable_encoder(result), self.status)
            return response
        value, errors = self.field.validate(result, {}, loc=("response",))
        if errors:
            raise ResponseValidationError(
                errors=errors, body=result, endpoint_ctx=self._describe(request)
            )
        body = self.field.serialize_json(value)
        return Response(body, self.status, media_type="application/json")

    def _describe(self, request: Request) -> EndpointContext:
        """Return the description of the route in FastAPI's error."""
        context = routing._extract_endpoint_context(self.steps[-1].call)
        mount_path = request.scope.get("root_path", "").rstrip("/")
        context["path"] = f"{request.method} {mount_path}{self.path}"
        return context


def quick_app(route: Any, app: Any) -> App | None:
    """Return the quicker equal of a route's application; None if there is none.

    There is none if an agent, a team or a subclass has put something around the handler.
    """
    if not (is_handled_as_usual(route) and is_defined_in(routing, app)):
        return None
    handler = inspect.getclosurevars(app).nonlocals.get("f")
    owner = getattr(handler, "__self__", None)
    return owner.serve if isinstance(owner, _QuickHandler) else None


def raising(error: Exception) -> ASGIApp:
    """Return an application that raises an error."""

    async def fail(_: Scope, __: Receive, ___: Send) -> None:
        raise error

    return fail


async def _read_json(request: Request) -> Any:
    """Return the value of a body of JSON, as FastAPI parses it; `Undefined` for any other body.

    Raises `HTTPException` as FastAPI does: that of a limit, or 400 if the body cannot be read.
    """
    if request.headers.get("content-type") != "application/json":
        return Undefined
    try:
        return await request.json()
    except json.JSONDecodeError:
        return Undefined
    except HTTPException:
        raise
    except Exception as error:
        raise HTTPException(400, "There was an error parsing the body") from error


def _is_known(route: Any) -> bool:
    """Return whether the response is made of the result alone, as JSON."""
    return (
        isinstance(route.response_class, DefaultPlaceholder)
        and route.response_model_by_alias is True
        and is_body_allowed_for_status_code(route.status_code)
        and not any(getattr(route, name) for name in _UNKNOWN_OF_ROUTE)
    )


def is_handled_as_usual(route: Any) -> bool:
    """Return whether FastAPI's own methods are what serves a route. Agents wrap both of them."""
    is_starlettes = is_defined_in(starlette.routing, starlette.routing.Route.handle)
    return is_starlettes and is_defined_in(routing, type(route).handle)


def is_defined_in(module: ModuleType, function: Any) -> bool:
    """Return whether a function is a library's own. Agents such as Sentry's wrap it, to see all."""
    # Some wrappers are objects that look like the function.
    return type(function) is FunctionType and function.__code__.co_filename == module.__file__
