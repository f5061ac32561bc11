"""The caller of a request, by its bearer token; off without `AUTH_ISSUER`.

A resource server of one OpenID provider (RFC 6750, RFC 9068, RFC 8725). It issues no tokens and
keeps no users.
Without an issuer, neither the library of signatures nor the client of the provider is imported.
"""

import contextlib
from collections.abc import AsyncIterator

from app.auth.authenticator import Authenticator
from app.settings import Settings


def preload(settings: Settings) -> None:
    """Import what verifies tokens if it will be used: in the master, whose memory is shared."""
    if settings.auth_issuer:
        import app.auth.keys
        import app.auth.tokens  # noqa: F401


@contextlib.asynccontextmanager
async def open_authenticator(settings: Settings) -> AsyncIterator[Authenticator | None]:
    """Yield what authenticates requests, or None while authentication is off.

    The keys of the provider are fetched in the background: a process starts without them.
    """
    if not settings.auth_issuer:
        yield None
        return
    from app.auth.keys import open_keys
    from app.auth.tokens import TokenVerifier

    async with open_keys(settings) as keys:
        verifier = TokenVerifier(settings, keys)
        authenticator = Authenticator(settings, verifier.verify)
        keys.on_removal = authenticator.forget
        yield authenticator
