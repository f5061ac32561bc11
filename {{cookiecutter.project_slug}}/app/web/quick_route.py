"""Routes at half of the cost: what FastAPI finds out for each request is decided once.

FastAPI looks for parameters, a body and security scopes per request, for the route and again for
each of its dependencies. A `QuickRoute` calls the functions by a plan instead. Opt in by router:

    router = APIRouter(prefix="/orders", route_class=QuickRoute)

The plan knows coroutine functions with parameters of the path, the query, headers and cookies, with
the `Request`, with one body of JSON, and with such dependencies, nested ones included. A route that
needs anything else, such as a form or a dependency with `yield`, is FastAPI's: slower, and the
same. So is an invalid request, and a body without `Content-Type: application/json`. Objects with a
coroutine function `__call__` count too, such as those of app/auth.

Such an object may have a `switch`: a name in the state of the process. While the state has nothing
of that name, the dependency has no effect, so the plan omits it unless its result is an argument.

`Directory` serves such a route without FastAPI's application around the handler, which opens three
exit stacks for dependencies with `yield` and for files, and handles exceptions a second time.
"""

import inspect
import json
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import fields
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

from fastapi import Request, Response, params, routing
from fastapi.datastructures import DefaultPlaceholder
from fastapi.dependencies.models import Dependant, _get_cache_key
from fastapi.dependencies.utils import get_validation_alias, request_params_to_args
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import EndpointContext, ResponseValidationError
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from fastapi.routing import APIRoute
from fastapi.utils import is_body_allowed_for_status_code
from pydantic_core import PydanticUndefined as Undefined
from starlette._exception_handler import wrap_app_handling_exceptions
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

#: An ASGI application.
App = Callable[[Scope, Receive, Send], Coroutine[Any, Any, None]]
Handler = Callable[[Request], Coroutine[Any, Any, Response]]
Arguments = dict[str, Any] | None

#: The kinds of parameters, and the attributes of the request that have their values. Those of the
#: path are simpler: each is there, once.
_SOURCES = {"query_params": "query_params", "header_params": "headers", "cookie_params": "cookies"}
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
#: The fields of a function and of a route that the plan knows. Others must be empty.
_KNOWN_OF_FUNCTION = {
    *("path_params", *_SOURCES, "body_params"),
    *("dependencies", "name", "call", "request_param_name", "http_connection_param_name"),
    # The scopes concern only the key of FastAPI's cache, and functions with `SecurityScopes`.
    *("use_cache", "path", "scope", "own_oauth_scopes", "parent_oauth_scopes"),
}
_UNKNOWN_OF_FUNCTION = [
    each.name for each in fields(Dependant) if each.name not in _KNOWN_OF_FUNCTION
]
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


class Step(NamedTuple):
    """One function of a plan, and its arguments."""

    call: Callable[..., Awaitable[Any]]
    #: The parameters of the path: the name, the name in the path, the function that validates.
    path: list[tuple[str, str, Callable[..., Any]]]
    #: The parameters of each other source.
    parameters: list[tuple[list[Any], str]]
    #: The parameter that is the body, if there is one.
    body: Any
    request_names: list[str]
    #: The names of the arguments that are results of earlier steps.
    results: list[tuple[str, int]]
    #: A name in the state of the process without which the function has no effect.
    switch: str | None
    #: Whether the request is its only argument, which costs less without its name.
    takes_only_request: bool


class QuickRoute(APIRoute):
    """A route of FastAPI whose functions are called by a plan, where that comes to the same."""

    def get_route_handler(self) -> Handler:
        """Return the function that handles a request. FastAPI calls this once per route."""
        usual = super().get_route_handler()
        # A router that includes the route adds dependencies. FastAPI has the sum of all in here.
        included: Any = routing._effective_route_context_var.get()
        is_included = included is not None and included.original_route is self
        route = included if is_included else self
        if not _is_of_fastapi(usual) or not _is_known(route):
            return usual
        plan = _Plan()
        plan.add(route.dependant)
        return _QuickHandler(route, plan, usual).handle if plan.is_known else usual


class _Plan:
    """The functions of a route, in the order in which FastAPI calls them; the last is its own."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.is_known = True
        #: The dependencies of each function, and a copy that shows a later change.
        self.dependencies: list[list[Dependant]] = []
        self.known_dependencies: list[list[Dependant]] = []
        self._indexes: dict[Any, int] = {}

    def add(self, function: Dependant) -> int:
        """Add a function and its dependencies; return the index of its step."""
        self.is_known = self.is_known and _is_simple(function)
        self.dependencies.append(function.dependencies)
        self.known_dependencies.append(function.dependencies.copy())
        results = []
        for each in function.dependencies:
            index = self.add(each)
            if each.name is not None:
                results.append((each.name, index))
        # FastAPI calls a function once per request, unless a dependency has `use_cache=False`.
        key = _get_cache_key(dependant=function)
        if function.use_cache and key in self._indexes:
            return self._indexes[key]
        self.steps.append(_step(function, results))
        return self._indexes.setdefault(key, len(self.steps) - 1)

    def without_switched(self) -> tuple[str | None, list[Step]]:
        """Return the first switch, and the steps without those that do nothing while it is off."""
        used = {index for step in self.steps for _, index in step.results} | {len(self.steps) - 1}
        switches = [step.switch for step in self.steps if step.switch]
        switch = switches[0] if switches else None
        kept: dict[int, int] = {}
        steps: list[Step] = []
        for index, step in enumerate(self.steps):
            if switch is None or step.switch != switch or index in used:
                kept[index] = len(steps)
                results = [(name, kept[used_index]) for name, used_index in step.results]
                steps.append(step._replace(results=results))
        return switch, steps


class _QuickHandler:
    """Handles the requests of a route by its plan, or else as FastAPI does."""

    def __init__(self, route: Any, plan: _Plan, usual: Handler) -> None:
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
            await wrap_app_handling_exceptions(_raise(error), request)(scope, receive, send)
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

        The arguments of a step that takes the request only are None.
        """
        arguments: list[tuple[Step, Arguments]] = []
        for step in self._steps(request):
            values = None
            if not step.takes_only_request:
                values = _read_arguments(step, request, body)
                if values is None:
                    return None
            arguments.append((step, values))
        return arguments

    def _steps(self, request: Request) -> list[Step]:
        """Return the steps that have an effect in this process."""
        if self.switch is None or request.scope.get("state", {}).get(self.switch) is not None:
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


def _read_arguments(step: Step, request: Request, body: Any) -> dict[str, Any] | None:
    """Return the arguments of a step, without results; None if one is not valid."""
    values: dict[str, Any] = dict.fromkeys(step.request_names, request)
    path_params = request.path_params
    for name, key, validate in step.path:
        values[name], errors = validate(path_params.get(key))
        if errors:
            return None
    for parameters, source in step.parameters:
        found, errors = request_params_to_args(parameters, getattr(request, source))
        if errors:
            return None
        values.update(found)
    if step.body is not None:
        values[step.body.name], errors = step.body.validate(body, loc=("body",))
        if errors:
            return None
    return values


def quick_app(route: Any, app: Any) -> App | None:
    """Return the quicker equal of a route's application; None if there is none.

    There is none if an agent, a team or a subclass has put something around the handler.
    """
    if not (_is_of_fastapi(type(route).handle) and _is_of_fastapi(app)):
        return None
    handler = inspect.getclosurevars(app).nonlocals.get("f")
    owner = getattr(handler, "__self__", None)
    return owner.serve if isinstance(owner, _QuickHandler) else None


def _raise(error: Exception) -> ASGIApp:
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


def _step(function: Dependant, results: list[tuple[str, int]]) -> Step:
    parameters = [
        (getattr(function, kind), source)
        for kind, source in _SOURCES.items()
        if getattr(function, kind)
    ]
    call = _coroutine_function(function.call)
    path = [(each.name, get_validation_alias(each), each.validate) for each in function.path_params]
    found = [function.request_param_name, function.http_connection_param_name]
    names = [name for name in found if name]
    body = next(iter(function.body_params), None)
    # Not inherited: what a subclass does may have an effect.
    switch = vars(type(function.call)).get("switch")
    needs_more = parameters or path or results or function.body_params
    takes_only_request = bool(names) and not needs_more and names == _first_parameter(call)
    return Step(call, path, parameters, body, names, results, switch, takes_only_request)


def _first_parameter(call: Any) -> list[str]:
    """Return the name of the first parameter, if it may be passed without its name."""
    # Not that of a decorated function, which its wrapper may not accept.
    parameters = inspect.signature(call, follow_wrapped=False).parameters.values()
    return [each.name for each in list(parameters)[:1] if each.kind in _POSITIONAL]


def _coroutine_function(call: Any) -> Any:
    """Return the function of a dependency that is an object, or else the dependency itself."""
    is_object = not (inspect.isroutine(call) or inspect.isclass(call) or isinstance(call, partial))
    return call.__call__ if is_object else call


def _is_simple(function: Dependant) -> bool:
    """Return whether a function is a coroutine function that needs nothing unknown."""
    call = _coroutine_function(function.call)
    is_coroutine = inspect.iscoroutinefunction(call)
    # FastAPI looks behind decorators too.
    is_coroutine_inside = inspect.iscoroutinefunction(inspect.unwrap(call))
    has_form = any(isinstance(each.field_info, params.Form) for each in function.body_params)
    needs_more = any(getattr(function, name) for name in _UNKNOWN_OF_FUNCTION)
    return is_coroutine and is_coroutine_inside and not has_form and not needs_more


def _is_known(route: Any) -> bool:
    """Return whether the response is made of the result alone, as JSON."""
    return (
        isinstance(route.response_class, DefaultPlaceholder)
        and route.response_model_by_alias is True
        and is_body_allowed_for_status_code(route.status_code)
        and not any(getattr(route, name) for name in _UNKNOWN_OF_ROUTE)
    )


def _is_of_fastapi(function: Any) -> bool:
    """Return whether a function is FastAPI's own. Agents such as Sentry's wrap it, to see all."""
    # Some wrappers are objects that look like the function.
    return type(function) is FunctionType and function.__code__.co_filename == routing.__file__
