"""Authenticates requests: finds the token, and remembers the tokens that were verified."""

import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

from starlette.types import Scope

from app.auth import errors
from app.auth.principal import Principal
from app.settings import Settings
from app.telemetry.context import request_context

#: Maximum size of a token. One with 200 groups has 6 kB; `MAX_HEADER_BYTES` is 32 kB.
MAX_TOKEN_BYTES = 16_384
#: Maximum number of tokens that are remembered, by process: about 4 kB each with its claims.
MAX_REMEMBERED = 2_000
#: Hexadecimal digits of a hashed subject in log lines.
LOGGED_DIGITS = 16


class Verified(NamedTuple):
    """A token that is valid until it expires."""

    principal: Principal
    #: The time at which it expires, by `time.time()`, the leeway included.
    expires_at: float


@dataclass(slots=True)
class Remembered:
    """A verified token without its signature."""

    #: The header up to the signature. Without that it is of no use to others.
    signed: bytes
    expires_at: float
    principal: Principal
    #: The principal in log lines; empty to have none.
    logged: str


Verify = Callable[[bytes], Awaitable[Verified]]


class Authenticator:
    """Authenticates the requests of a process: `recall`, and if it returns None `authenticate`."""

    def __init__(self, settings: Settings, verify: Verify) -> None:
        """`verify` returns what a token means; it raises a `ServiceError`."""
        self.realm = settings.service_name
        self.log_principal = settings.log_principal
        self.verify = verify
        #: In front of what is hashed: with `PYTHONHASHSEED` set, others know Python's own key.
        self.salt = secrets.token_bytes(16)
        #: By the hash of the header, the latest last: no signature stays in memory.
        self.remembered: dict[int, Remembered] = {}
        errors.start_counting()

    def recall(self, scope: Scope) -> Principal | None:
        """Return the caller of a request, and note it, if its token is remembered; None if not.

        The header up to the signature must be the same, and the hash of the whole, 64 bits. To find
        a header with that hash requires 2**63 attempts on average, each of which is verified.

        Raises an error of `app.auth.errors`.
        """
        credentials = self._find_credentials(scope)
        known = self.remembered.get(hash(self.salt + credentials))
        if known is None or not credentials.startswith(known.signed):
            return None
        if known.expires_at <= time.time():
            return None
        return _note(known, scope)

    async def authenticate(self, scope: Scope) -> Principal:
        """Return the caller of a request, and note it, if its token is valid.

        Raises an error of `app.auth.errors`.
        """
        credentials = self._find_credentials(scope)
        key = hash(self.salt + credentials)
        self.remembered.pop(key, None)
        principal, expires_at = await self._verify(credentials)
        signed, _, _ = credentials.rpartition(b".")
        known = Remembered(signed, expires_at, principal, self._logged(principal))
        self.remembered[key] = known
        if len(self.remembered) > MAX_REMEMBERED:
            del self.remembered[next(iter(self.remembered))]
        return _note(known, scope)

    def forget(self) -> None:
        """Forget all tokens: a key that has signed some of them is not trusted any more."""
        self.remembered.clear()

    def _find_credentials(self, scope: Scope) -> bytes:
        """Return the value of the `Authorization` header (RFC 6750, section 2.1).

        A token in the query is in the logs of each proxy, and not accepted (RFC 9700, section 2.6).
        """
        found: bytes | None = None
        for name, value in scope["headers"]:
            if name == b"authorization":
                if found is not None:
                    raise errors.AmbiguousTokenError(self.realm)
                found = value
        if found is None:
            raise errors.MissingTokenError(self.realm)
        query = scope["query_string"]
        if query and b"access_token=" in query:
            raise errors.AmbiguousTokenError(self.realm)
        return found

    async def _verify(self, credentials: bytes) -> Verified:
        scheme, _, token = credentials.partition(b" ")
        if scheme.lower() != b"bearer":
            raise errors.MissingTokenError(self.realm)
        if len(token) > MAX_TOKEN_BYTES:
            raise errors.InvalidTokenError(self.realm, "malformed", "The token is too large.")
        return await self.verify(token.strip())

    def _logged(self, principal: Principal) -> str:
        """Return the principal for log lines.

        A plain digest is the same in every pod, service and release, without a secret to share. It
        is a pseudonym: a list of all subjects leads from it to one of them.
        """
        if self.log_principal == "plain":
            return principal.subject
        if self.log_principal == "none":
            return ""
        text = f"{principal.issuer} {principal.subject}"
        return sha256(text.encode()).hexdigest()[:LOGGED_DIGITS]


def _note(known: Remembered, scope: Scope) -> Principal:
    """Note the caller in the state and in the log lines of a request; return it."""
    scope["state"]["principal"] = known.principal
    context = request_context.get()
    if known.logged and context is not None:
        context["principal"] = known.logged
    return known.principal
