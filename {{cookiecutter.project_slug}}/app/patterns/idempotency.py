"""Idempotency-Key (IETF draft 06): a request that comes again gets the answer of the first one, without its effects.

Key, answer and effects are committed in one transaction: a crash leaves nothing behind, not even "in progress".
"""

import hashlib
import json
import re
from collections.abc import Awaitable, Callable
from typing import Annotated, NamedTuple

from fastapi import Depends, Request, Response

from app.errors import ServiceError
from app.storage.postgres import Connection

_KEY = re.compile(
    r'"([ -~]{1,255})"|(?!"")([ -~]{1,255})'
)  # quoted, as the draft wants it, or bare, as most send it
_FIND = (
    "select fingerprint, status, headers, body from idempotency_keys where (scope, key) = ($1, $2)"
)
_COLUMNS = "scope, key, fingerprint, status, headers, body"
_STORE = f"insert into idempotency_keys ({_COLUMNS}) values ($1, $2, $3, $4, $5, $6)"  # noqa: S608
_SCHEMA = {"type": "string", "pattern": '^("[ -~]{1,255}"|[ -~]{1,255})$'}
#: For `openapi_extra=` of a route.
OPENAPI_PARAMETERS = {
    "parameters": [{"name": "Idempotency-Key", "in": "header", "required": True, "schema": _SCHEMA}]
}


class IdempotencyError(ServiceError):
    """No key, or none that is valid: 400; its first request is being served: 409; it came with another one: 422."""

    def __init__(self, status: int, detail: str) -> None:
        self.status = status
        super().__init__(detail, {"Retry-After": "1"} if status == 409 else None)


class StoredResponse(NamedTuple):
    """What is stored with a key, and sent again: a status, header fields, a body of JSON."""

    status: int
    headers: dict[str, str]
    body: bytes


async def _key(request: Request) -> str:
    if found := _KEY.fullmatch(
        "\n".join(request.headers.getlist("idempotency-key"))
    ):  # which refuses two
        return found[1] or found[2]
    raise IdempotencyError(
        400, "The header field Idempotency-Key takes 1 to 255 printable characters."
    )


#: The type of a route's parameter: the key of the request.
IdempotencyKey = Annotated[str, Depends(_key)]


async def once(
    connection: Connection,
    scope: str,
    key: str,
    content: bytes,
    work: Callable[[Connection], Awaitable[StoredResponse]],
) -> Response:
    """Do `work` in a transaction, or answer as before, with `Idempotent-Replayed`. Raises `IdempotencyError`.

    `scope` is the route and whose key it is; `content` must not differ. If `work` raises, nothing is stored.
    """
    fingerprint = hashlib.sha256(content).digest()
    async with connection.transaction():
        # A statement of its own, so that the next one sees what the last holder of the lock has committed.
        lock = "select pg_try_advisory_xact_lock(hashtextextended($1 || chr(31) || $2, 0))"
        if not await connection.fetchval(lock, scope, key):
            raise IdempotencyError(409, "A request with this Idempotency-Key is being served.")
        if row := await connection.fetchrow(_FIND, scope, key):
            if row["fingerprint"] != fingerprint:
                raise IdempotencyError(422, "This Idempotency-Key has come with another request.")
            headers = json.loads(row["headers"]) | {"Idempotent-Replayed": "true"}
            return Response(row["body"], row["status"], headers, "application/json")
        status, headers, body = await work(connection)
        await connection.execute(_STORE, scope, key, fingerprint, status, json.dumps(headers), body)
    return Response(body, status, headers, "application/json")


async def delete_expired(connection: Connection, batch: int, hours: int = 24) -> int:
    """Delete up to `batch` keys that are older, and return how many; several may do so at once."""
    old = "select ctid from idempotency_keys where created_at < now() - make_interval(hours => $1) limit $2"
    query = f"delete from idempotency_keys where ctid = any(array({old} for update skip locked))"  # noqa: S608
    return int((await connection.execute(query, hours, batch)).split()[1])
