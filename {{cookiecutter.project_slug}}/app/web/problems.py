"""Errors as problem details (RFC 9457): every error response has this one shape and carries the request ID."""

import re
from collections.abc import Mapping
from http import HTTPMethod, HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from app.telemetry.context import request_context

MEDIA_TYPE = "application/problem+json"
_TEXTS = {name: {"type": "string"} for name in ("type", "title", "detail", "request_id")}
_MEMBERS = {**_TEXTS, "status": {"type": "integer"}}
_SCHEMA = {
    "title": "Problem",
    "type": "object",
    "required": ["type", "title", "status"],
    "properties": _MEMBERS,
}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_TITLES = {status.value: status.phrase for status in HTTPStatus}


def problem(
    status: int, detail: str | None = None, headers: Mapping[str, str] | None = None, **members: Any
) -> Response:
    """Return a problem response; `members` are added to the document (RFC 9457, section 3.2)."""
    document = {
        "type": "about:blank",
        "title": _TITLES.get(status, "Error"),
        "status": status,
        **(request_context.get() or {}),
    }
    if detail and detail != document["title"]:
        document["detail"] = detail
    fields = {"Cache-Control": "no-store", **(headers or {})}
    return Response(orjson.dumps(document | members), status, fields, media_type=MEDIA_TYPE)


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of the problems that a route may answer, for its `responses=`."""
    content = {MEDIA_TYPE: {"schema": _SCHEMA}}
    return {
        status: {"description": _TITLES.get(status, "Error"), "content": content}
        for status in statuses
    }


async def _http_error(request: Request, error: HTTPException) -> Response:
    if error.status_code == 405:
        return problem(405, None, {"Allow": _allowed(request)})
    if error.status_code in {204, 304}:  # these have no body (RFC 9110, sections 15.3.5 and 15.4.5)
        return Response(status_code=error.status_code, headers=error.headers)
    return problem(error.status_code, str(error.detail), error.headers)


def _allowed(request: Request) -> str:
    """Return all methods that the path takes (RFC 9110, section 15.5.6); Starlette names those of one route alone."""
    scopes = {method: {**request.scope, "method": method} for method in HTTPMethod}
    found = [
        m
        for m, s in scopes.items()
        if any(r.matches(s)[0] is Match.FULL for r in request.app.routes)
    ]
    return ", ".join(found)


async def _invalid_request(_: Request, error: RequestValidationError) -> Response:
    faults = [{"detail": _reason(fault), "pointer": _pointer(fault)} for fault in error.errors()]
    return problem(422, "The request does not match what this route takes.", errors=faults)


def _reason(fault: Mapping[str, Any]) -> str:
    """Return pydantic's message without the parts that quote the input: a card number must not come back.

    What a validator of ours raises is passed on, so it must not hold the value either.
    """
    context, message = fault.get("ctx", {}), str(fault["msg"])
    if "tag" in context:
        return "Input does not match any of the expected kinds"
    if isinstance(context.get("error"), str):
        message = message.removesuffix(context["error"]).rstrip(" ,:")
    return message.removeprefix("Value error, ")


def _pointer(fault: Mapping[str, Any]) -> str:
    """Return a JSON Pointer into the body (RFC 6901, section 6: `#/amount`), or `query/limit` for a parameter.

    A key that is no name is shown as `*`: it is the client's own.
    """
    place, *path = fault["loc"]
    if fault["type"] in {
        "extra_forbidden",
        "json_invalid",
    }:  # the last part is the client's own text, or an offset
        path = path[:-1]
    steps = [str(step) if isinstance(step, int) or _NAME.fullmatch(step) else "*" for step in path]
    return "/".join(["#" if place == "body" else place, *steps])


async def _redis_unavailable(_: Request, __: Exception) -> Response:
    """Answer 503 for a request that could not do without Redis."""
    return problem(503, "The cache is not available.", {"Retry-After": "1"})


def install_handlers(app: FastAPI) -> None:
    """Answer every error of the app as a problem; unhandled exceptions are observe.py's."""
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(RequestValidationError)(_invalid_request)
    app.exception_handler(RedisError)(_redis_unavailable)
