"""Idempotency-Key (IETF draft 06): replay the response to a repeated request.

The request has its effects once. Key, response and effects are committed in one transaction: a
crash leaves nothing behind, not even "in progress". The response is stored before the effects, so
it must not depend on them: make IDs and times in Python. Work of several steps:

    async with connection.transaction():
        if await idempotency.claim(connection, claim):
            ...
            return claim.response
    return await idempotency.replay(connection, claim)

Work of one statement, which is one round trip without a transaction of its own:

    with claimed as ({idempotency.CLAIM}), ... insert into ... select $7, ... from claimed
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
#: Stores the response and returns a row, if the key is new. Its parameters are `Claim.arguments()`.
#: The row of a key that is new is unique, whatever a snapshot shows. The lock only spares requests
#: with the same key the wait for the first one: they get no row at once.
CLAIM = """
    insert into idempotency_keys (scope, key, fingerprint, status, headers, body)
    select $1, $2, $3, $4, $5, $6
    where pg_try_advisory_xact_lock(hashtextextended($1 || chr(31) || $2, 0))
    on conflict do nothing returning true
"""
_FIND = """
    select fingerprint, status, headers, body from idempotency_keys where (scope, key) = ($1, $2)
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


class Claim(NamedTuple):
    """A key, the request that uses it, and the response to store if the key is new.

    `scope` is the route and the owner of the key; `content` identifies the request.
    """

    scope: str
    key: str
    content: bytes
    response: StoredResponse

    def fingerprint(self) -> bytes:
        """Return a hash of the content."""
        return hashlib.sha256(self.content).digest()

    def arguments(self) -> tuple[str, str, bytes, int, str, bytes]:
        """Return the arguments `$1` to `$6` of `CLAIM`."""
        status, headers, body = self.response
        return self.scope, self.key, self.fingerprint(), status, json.dumps(headers), body


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


async def claim(connection: Connection, claim: Claim) -> bool:
    """Store the response of a new key; return whether the key is new.

    If it is, apply the effects in the same transaction. If not, call `replay`. Raises
    `RuntimeError` outside a transaction, which would store a response without its effects.
    """
    if not connection.is_in_transaction():
        msg = "an idempotency key must be claimed in the transaction of its effects"
        raise RuntimeError(msg)
    return bool(await connection.fetchval(CLAIM, *claim.arguments()))


async def replay(connection: Connection, claim: Claim) -> StoredResponse:
    """Return the stored response of a key that is not new.

    The response has the header `Idempotent-Replayed: true`. A statement of its own, after the
    claim: it then sees the commit of the first request.

    Raises `IdempotencyError`: 409 if the first request is in progress, 422 if the key was used with
    different content.
    """
    row = await connection.fetchrow(_FIND, claim.scope, claim.key)
    if row is None:
        raise KeyInUseError("A request with this Idempotency-Key is in progress.")
    if row["fingerprint"] != claim.fingerprint():
        message = "This Idempotency-Key was already used with a different request."
        raise KeyReusedError(message)
    headers = json.loads(row["headers"]) | {"Idempotent-Replayed": "true"}
    return StoredResponse(row["status"], headers, row["body"])


async def delete_expired(connection: Connection, batch: int) -> int:
    """Delete up to `batch` expired keys; return how many. A periodic job."""
    return await delete_older(connection, "idempotency_keys", "created_at", EXPIRY_HOURS, batch)
