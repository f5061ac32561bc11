"""The routes of the application, those of mounted applications included."""

from collections.abc import Iterator, Sequence
from http import HTTPMethod
from typing import Any

from fastapi.routing import iter_route_contexts
from starlette.routing import BaseRoute, Host, Match, Mount
from starlette.types import Scope


def route_template(scope: Scope) -> str:
    """Return the path template of a request's route, prefixes included, or `unmatched`."""
    # FastAPI 0.163 keeps the route of an included router, with its prefixes, here.
    included = scope.get("fastapi", {}).get("effective_route_context")
    path: str | None = getattr(included or scope.get("route"), "path", None)
    if path and "app_root_path" not in scope:
        return path
    return _mount_prefix(scope) + _path_in_application(scope) or "unmatched"


def is_mounted(scope: Scope) -> bool:
    """Return whether a mounted application handles the request: Starlette's `Mount` sets this."""
    return "app_root_path" in scope


def allowed_methods(scope: Scope) -> list[str]:
    """Return all methods of the path (RFC 9110, section 15.5.6); Starlette lists one route's.

    Empty if only a mounted application knows them.
    """
    start = {**scope, "root_path": _outer_root_path(scope)}
    routes = scope["router"].routes
    methods: list[str] = []
    for method in HTTPMethod:
        is_head_of_get = method == "HEAD" and "GET" in methods  # see head.py
        if is_head_of_get or handles(routes, {**start, "method": method}):
            methods.append(method)
    return methods


def handles(routes: Sequence[BaseRoute], scope: Scope) -> bool:
    """Return whether one of the routes matches path and method."""
    for route, child_scope in _full_matches(routes, scope):
        if not isinstance(route.original_route, Mount | Host):
            return True
        if handles(routes_of(route.app), {**scope, **child_scope}):
            return True
    return False


def find_endpoint(routes: Sequence[BaseRoute], scope: Scope) -> object:
    """Return the function that handles a request, or None."""
    for route, child_scope in _full_matches(routes, scope):
        if not isinstance(route.original_route, Mount | Host):
            return child_scope.get("endpoint")
        endpoint = find_endpoint(routes_of(route.app), {**scope, **child_scope})
        if endpoint is not None:
            return endpoint
    return None


def endpoints(routes: Sequence[BaseRoute]) -> Iterator[object]:
    """Yield the functions of all routes, those of mounted applications included."""
    route: Any
    for route in iter_route_contexts(routes):
        if isinstance(route.original_route, Mount | Host):
            yield from endpoints(routes_of(route.app))
        else:
            yield route.endpoint


def _full_matches(routes: Sequence[BaseRoute], scope: Scope) -> Iterator[tuple[Any, Scope]]:
    """Yield the routes that match path and method, those of included routers one by one."""
    for route in iter_route_contexts(routes):
        match, child_scope = route.matches(scope)
        if match is Match.FULL:
            yield route, child_scope


def _mount_prefix(scope: Scope) -> str:
    """Return the templates of the mounts on the way to the route.

    The path itself would be another time series for each value of a parameter in it.
    """
    if not is_mounted(scope):
        return ""
    steps: dict[str, Any] = {**scope, "root_path": _outer_root_path(scope)}
    routes = scope["router"].routes
    prefix = ""
    while steps["root_path"] != scope["root_path"]:
        step = next(_full_matches(routes, steps), None)
        if step is None:  # an application with a root path of its own
            break
        route, child_scope = step
        prefix += route.path if isinstance(route.original_route, Mount) else ""
        steps.update(child_scope)
        routes = routes_of(route.app)
    return prefix


def _outer_root_path(scope: Scope) -> str:
    """Return the root path of the service: a `Mount` has appended its own to `root_path`."""
    root_path: str = scope.get("app_root_path", scope.get("root_path", ""))
    return root_path


def routes_of(app: Any) -> Sequence[BaseRoute]:
    """Return the routes of a mounted application, middleware around it or not."""
    while not hasattr(app, "routes") and hasattr(app, "app"):
        app = app.app
    routes: Sequence[BaseRoute] = getattr(app, "routes", ())
    return routes


def _path_in_application(scope: Scope) -> str:
    """Return the template of the innermost route, empty if that is a mount or there is none."""
    route = scope.get("route")
    included = scope.get("fastapi", {}).get("effective_route_context")
    is_current = included is not None and included.original_route is route
    if included is not None and (is_current or not hasattr(route, "path")):
        route = included.starlette_route or included
    return "" if isinstance(route, Mount) else getattr(route, "path", "")
