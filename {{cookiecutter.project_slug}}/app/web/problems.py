"""Problem details (RFC 9457): every error response has this shape and carries the request ID."""

import logging
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException

from app.errors import InvalidRequestError, ServiceError
from app.tasks import RecentCauses, describe
from app.telemetry.context import request_context
from app.web.routes import allowed_methods

logger = logging.getLogger("app.problems")
#: The causes of 503s, those of the readiness probe included: each is logged once.
recent_causes = RecentCauses()
MEDIA_TYPE = "application/problem+json"
_TITLES = {status.value: status.phrase for status in HTTPStatus}
_SCHEMA: dict[str, Any] = {
    "title": "Problem",
    "type": "object",
    "required": ["type", "title", "status"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "code": {"type": "string"},
        "detail": {"type": "string"},
        "request_id": {"type": "string"},
        "status": {"type": "integer"},
    },
}
#: Headers of a response, by status, with their descriptions.
_HEADERS = {
    401: {"WWW-Authenticate": "How to authenticate."},
    429: {"Retry-After": "Seconds after which a retry may succeed."},
    503: {"Retry-After": "Seconds after which a retry may succeed."},
}
#: Keys of the body that are shown in a pointer; others are the client's own text.
_SHOWN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")


def problem(
    status: int, detail: str | None = None, headers: Mapping[str, str] | None = None, **members: Any
) -> Response:
    """Return a problem response. `members` extend the document (RFC 9457, section 3.2)."""
    document = {
        "type": "about:blank",
        "title": _TITLES.get(status, "Error"),
        "status": status,
        **(request_context.get() or {}),
    }
    document.pop("principal", None)  # of the log lines
    if detail and detail != document["title"]:
        document["detail"] = detail
    content = orjson.dumps(document | members, option=orjson.OPT_NON_STR_KEYS)
    all_headers = {"Cache-Control": "no-store", **(headers or {})}
    return Response(content, status, all_headers, media_type=MEDIA_TYPE)


def http_problem(error: HTTPException, headers: Mapping[str, str] | None = None) -> Response:
    """Return the problem of an HTTP error, with its headers, or with others.

    A `detail` that is not text is the member `details`: RFC 9457 defines `detail` as text
    (section 3.1.4), and members of our own for the rest (section 3.2).
    """
    detail: object = error.detail
    headers = error.headers if headers is None else headers
    members = _identify(error) if isinstance(error, ServiceError) else {}
    if detail is None or isinstance(detail, str | Exception):
        return problem(error.status_code, str(detail or ""), headers, **members)
    details = jsonable_encoder(detail)
    return problem(error.status_code, None, headers, details=details, **members)


def _identify(error: ServiceError) -> dict[str, str]:
    """Return the members by which programs tell this error from others of its status."""
    members = {"code": error.code} if error.code else {}
    if error.type != "about:blank":
        members["type"] = error.type
        # A type of its own has a title of its own (RFC 9457, section 4.2.1).
        members["title"] = error.title or _TITLES.get(error.status_code, "Error")
    return members


def problem_responses(*errors: int | type[ServiceError]) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of problems, for `responses=` of a route.

    Each is a status, or a class of errors, whose code becomes part of the description.
    """
    codes: dict[int, list[str]] = {}
    for error in errors:
        status = error if isinstance(error, int) else error.status
        known = codes.setdefault(status, [])
        if not isinstance(error, int) and error.code and error.code not in known:
            known.append(error.code)
    return {status: _describe_response(status, known) for status, known in codes.items()}


def _describe_response(status: int, codes: list[str]) -> dict[str, Any]:
    schema = _SCHEMA
    if codes:
        schema = {
            **_SCHEMA,
            "properties": {**_SCHEMA["properties"], "code": {"type": "string", "enum": codes}},
        }
    response: dict[str, Any] = {
        "description": _TITLES.get(status, "Error"),
        "content": {MEDIA_TYPE: {"schema": schema}},
    }
    if status in _HEADERS:
        response["headers"] = {
            name: {"description": text, "schema": {"type": "string"}}
            for name, text in _HEADERS[status].items()
        }
    return response


def install_handlers(app: FastAPI) -> None:
    """Turn every error of the application into a problem.

    A bug is the request middleware's, and this handler's inside of agents such as OpenTelemetry's,
    which respond themselves. A team may replace it.
    """
    app.exception_handler(Exception)(respond_to_bug)
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(RequestValidationError)(_validation_error)
    app.exception_handler(RedisError)(_redis_unavailable)


async def respond_to_bug(_: Request, error: Exception) -> Response:
    """Respond 500, or what an error is that middleware has raised. Starlette raises it again."""
    return http_problem(error) if isinstance(error, ServiceError) else problem(500)


async def _http_error(request: Request, error: HTTPException) -> Response:
    log_cause(error)
    if error.status_code in {204, 304}:  # without a body (RFC 9110, sections 15.3.5 and 15.4.5)
        return Response(status_code=error.status_code, headers=error.headers)
    if error.status_code == 405:
        return http_problem(error, _with_allowed_methods(request, error.headers or {}))
    return http_problem(error)


async def _validation_error(_: Request, error: RequestValidationError) -> Response:
    errors = [{"detail": _detail(each), "pointer": _pointer(each)} for each in error.errors()]
    code = InvalidRequestError.code
    return problem(422, "Request validation failed.", code=code, errors=errors)


async def _redis_unavailable(_: Request, error: Exception) -> Response:
    """Respond 503 to a request that needs Redis."""
    _warn(503, error)
    return problem(503, "Redis is not available.", {"Retry-After": "1"})


def log_cause(error: HTTPException) -> None:
    """Log, in one line, what an error of status 5xx was raised from.

    A 500 is a bug, logged each time with the tracebacks of both. Others are outages, of which each
    cause is logged once a minute.
    """
    cause = error.__cause__
    if cause is None or error.status_code < 500:
        return
    if error.status_code == 500:
        extra = {"reason": type(cause).__name__}
        logger.error("responded 500: %s", describe(cause), exc_info=error, extra=extra)
    else:
        _warn(error.status_code, cause)


def _warn(status: int, cause: BaseException) -> None:
    description = describe(cause)
    if recent_causes.is_new(description):
        extra = {"reason": type(cause).__name__}
        logger.warning("responded %d: %s", status, description, extra=extra)


def _with_allowed_methods(request: Request, given: Mapping[str, str]) -> dict[str, str]:
    """Return the headers of a 405 with `Allow`, which is required (RFC 9110, section 15.5.6).

    A handler, or an application that is mounted, may have set it itself.
    """
    headers = dict(given)
    own = [headers.pop(name) for name in given if name.lower() == "allow"]
    methods = allowed_methods(request.scope)
    is_from_handler = request.method in methods
    if is_from_handler:
        methods.remove(request.method)
    if own and (is_from_handler or not methods):
        return headers | {"Allow": own[0]}
    return headers | {"Allow": ", ".join(methods)}


def _detail(error: Mapping[str, Any]) -> str:
    """Return pydantic's message without its quotes of the input, such as a card number.

    The text of a validator of ours is kept, so it must not quote the input either.
    """
    context = error.get("ctx", {})
    message = str(error["msg"])
    if "tag" in context:
        return "Input does not match any of the expected kinds"
    if isinstance(context.get("error"), str):
        message = message.removesuffix(context["error"]).rstrip(" ,:")
    return message.removeprefix("Value error, ")


def _pointer(error: Mapping[str, Any]) -> str:
    """Return a JSON Pointer into the body (RFC 6901, section 6), or the name of a parameter.

    Such as `#/amount`, or `query/limit`. A key that is not an identifier is shown as `*`.
    """
    place, *path = error["loc"]
    if error["type"] in {"extra_forbidden", "json_invalid"}:
        path = path[:-1]  # the client's own text, or an offset
    steps = [_step(each) for each in path]
    return "/".join(["#" if place == "body" else place, *steps])


def _step(key: int | str) -> str:
    is_shown = isinstance(key, int) or _SHOWN_KEY.fullmatch(key) is not None
    return str(key) if is_shown else "*"
