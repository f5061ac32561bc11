"""Idempotency-Key (IETF draft 06): replay the response to a repeated request.

The request has its effects once. Key, response and effects are committed in one transaction: a
crash leaves nothing behind, not even "in progress".

    async with connection.transaction():
        stored = await idempotency.replay(connection, scope, key, content)
        if stored is not None:
            return stored
        ...
        return await idempotency.remember(connection, scope, key, content, response)
"""

import hashlib
import json
import re
from typing import Annotated, NamedTuple

from fastapi import Depends, Request, Response

from app.errors import ServiceError
from app.storage.postgres import Connection, delete_older

#: Keys expire after a day.
EXPIRY_HOURS = 24
#: Quoted, as the draft requires it, or bare, as most clients send it.
_KEY = re.compile(r'"([ -~]{1,255})"|(?!"")([ -~]{1,255})')
_KEY_SCHEMA = {"type": "string", "pattern": '^("[ -~]{1,255}"|[ -~]{1,255})$'}
#: For `openapi_extra=` of a route.
OPENAPI_PARAMETERS = {
    "parameters": [
        {"name": "Idempotency-Key", "in": "header", "required": True, "schema": _KEY_SCHEMA}
    ]
}
_LOCK = "select pg_try_advisory_xact_lock(hashtextextended($1 || chr(31) || $2, 0))"
_FIND = """
    select fingerprint, status, headers, body from idempotency_keys where (scope, key) = ($1, $2)
"""
_STORE = """
    insert into idempotency_keys (scope, key, fingerprint, status, headers, body)
    values ($1, $2, $3, $4, $5, $6)
"""


class IdempotencyError(ServiceError):
    """The key cannot be used: see the three classes below."""


class KeyInvalidError(IdempotencyError):
    """The key is missing, or not a valid one: 400."""

    status = 400
    code = "idempotency_key_invalid"


class KeyInUseError(IdempotencyError):
    """The first request with the key is in progress: 409 with `Retry-After`."""

    status = 409
    code = "idempotency_key_in_use"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, {"Retry-After": "1"})


class KeyReusedError(IdempotencyError):
    """The key was used with a different request: 422."""

    status = 422
    code = "idempotency_key_reused"


class StoredResponse(NamedTuple):
    """A response that is stored with its key: status, headers, and a body of JSON."""

    status: int
    headers: dict[str, str]
    body: bytes

    def render(self) -> Response:
        """Return it as a response of FastAPI."""
        return Response(self.body, self.status, self.headers, "application/json")


async def _key(request: Request) -> str:
    # Two headers become two lines, which do not match.
    text = "\n".join(request.headers.getlist("idempotency-key"))
    found = _KEY.fullmatch(text)
    if found is None:
        message = "Idempotency-Key must be 1 to 255 printable ASCII characters."
        raise KeyInvalidError(message)
    quoted, bare = found.groups()
    return str(quoted or bare)


#: The type of a route's parameter: the key of the request.
IdempotencyKey = Annotated[str, Depends(_key)]


async def replay(
    connection: Connection, scope: str, key: str, content: bytes
) -> StoredResponse | None:
    """Return the stored response of a key, or None for a new key.

    The response has the header `Idempotent-Replayed: true`. A new key is locked until the
    transaction ends: apply the effects on the same connection, then call `remember`. `scope` is the
    route and the owner of the key; `content` identifies the request.

    Raises `IdempotencyError`: 409 if another transaction has locked the key, 422 if the key was
    used with different content. Raises `RuntimeError` outside a transaction.
    """
    _require_transaction(connection)
    # A statement of its own: the next one then sees the commit of the last holder of the lock.
    if not await connection.fetchval(_LOCK, scope, key):
        raise KeyInUseError("A request with this Idempotency-Key is in progress.")
    row = await connection.fetchrow(_FIND, scope, key)
    if row is None:
        return None
    if row["fingerprint"] != _fingerprint(content):
        message = "This Idempotency-Key was already used with a different request."
        raise KeyReusedError(message)
    headers = json.loads(row["headers"]) | {"Idempotent-Replayed": "true"}
    return StoredResponse(row["status"], headers, row["body"])


async def remember(
    connection: Connection, scope: str, key: str, content: bytes, response: StoredResponse
) -> StoredResponse:
    """Store the response to the first request with a key; return it.

    Call `replay` before, in the same transaction: it locks the key. Raises `RuntimeError` outside a
    transaction.
    """
    _require_transaction(connection)
    fingerprint = _fingerprint(content)
    headers = json.dumps(response.headers)
    await connection.execute(
        _STORE, scope, key, fingerprint, response.status, headers, response.body
    )
    return response


async def delete_expired(connection: Connection, batch: int) -> int:
    """Delete up to `batch` expired keys; return how many. A periodic job."""
    return await delete_older(connection, "idempotency_keys", "created_at", EXPIRY_HOURS, batch)


def _fingerprint(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _require_transaction(connection: Connection) -> None:
    if not connection.is_in_transaction():
        msg = "an idempotency key must be used in the transaction of its effects"
        raise RuntimeError(msg)
