"""The plan of a `QuickRoute`: its functions and their arguments, found out once per route."""

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

from fastapi import Request, params
from fastapi.dependencies.models import Dependant, _get_cache_key
from fastapi.dependencies.utils import get_validation_alias, request_params_to_args

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
    #: A name in the state of the process: while that is None, the function has no effect.
    switch: str | None
    #: Whether the request is its only argument, which costs less without its name.
    takes_only_request: bool

    def read_arguments(self, request: Request, body: Any) -> dict[str, Any] | None:
        """Return the arguments, without results; None if one is not valid."""
        values: dict[str, Any] = dict.fromkeys(self.request_names, request)
        path_params = request.path_params
        for name, key, validate in self.path:
            values[name], errors = validate(path_params.get(key))
            if errors:
                return None
        for parameters, source in self.parameters:
            found, errors = request_params_to_args(parameters, getattr(request, source))
            if errors:
                return None
            values.update(found)
        if self.body is not None:
            values[self.body.name], errors = self.body.validate(body, loc=("body",))
            if errors:
                return None
        return values


class Plan:
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
