"""Verifies access tokens: JWTs that the issuer has signed for this service.

RFC 9068 defines them, RFC 8725 the attacks. Of the header count `alg`, `kid` and `typ`. The keys
are the issuer's alone: `jwk`, `jku`, `x5c` and `x5u` are ignored. Because of a token nothing is
fetched but the issuer's keys.
"""

import time
from collections.abc import Mapping
from typing import Any, TypeGuard

import orjson
from joserfc import jws
from joserfc.errors import JoseError, UnsupportedAlgorithmError

from app.auth.authenticator import MAX_TOKEN_BYTES, Verified
from app.auth.errors import InvalidTokenError
from app.auth.jwks import Key
from app.auth.keys import KeySource
from app.auth.principal import Principal
from app.settings import Settings

#: The types of access tokens (RFC 9068, section 2.1). Auth0, Entra ID, Cognito and Keycloak send
#: `JWT`, or none. All others are other tokens, such as `logout+jwt` (RFC 8725, section 3.11).
TYPES = frozenset({None, "at+jwt", "application/at+jwt", "jwt"})
#: The claims that name the client: RFC 9068, Keycloak and Google, Okta, Entra ID.
CLIENT_CLAIMS = ("client_id", "azp", "cid", "appid")
#: OpenID Connect Core 1.0, section 2. It is part of keys in Postgres, where 2.7 kB are too many.
MAX_SUBJECT_CHARACTERS = 255
#: What reading a token may raise that is no token.
_UNREADABLE = (JoseError, ValueError, TypeError, RecursionError)


class _Registry(jws.JWSRegistry):
    """The allowed algorithms, without the library's warning for each token that has `EdDSA`.

    RFC 9864 deprecates that name, which most providers send.
    """

    max_header_length = MAX_TOKEN_BYTES
    max_payload_length = MAX_TOKEN_BYTES

    def get_alg(self, name: str) -> Any:
        """Return an algorithm. Raises `UnsupportedAlgorithmError` if it is not allowed."""
        if name not in (self.allowed or ()):
            raise UnsupportedAlgorithmError
        return self.algorithms[name]


class TokenVerifier:
    """Verifies tokens by the settings, and by the keys of the issuer."""

    def __init__(self, settings: Settings, keys: KeySource) -> None:
        self.realm = settings.service_name
        self.issuer = settings.auth_issuer
        self.audience = settings.auth_audience
        self.leeway = settings.auth_leeway_seconds
        self.scopes_claim = settings.auth_scopes_claim
        self.keys = keys
        # Headers that are not known are ignored (RFC 7515, section 4).
        self.registry = _Registry(algorithms=settings.auth_algorithms, strict_check_header=False)

    async def verify(self, token: bytes) -> Verified:
        """Return what a token means.

        Raises `InvalidTokenError`, or `KeysUnavailableError` if its key is not known.
        """
        parsed = self._parse(token)
        key = await self._find_key(parsed.protected)
        self._check_signature(parsed, key)
        claims = self._read_claims(parsed.payload)
        expires_at = self._check_claims(claims)
        return Verified(self._principal(claims), expires_at)

    def _parse(self, token: bytes) -> jws.CompactSignature:
        """Return the parts of a token whose header is acceptable."""
        try:
            parsed = jws.extract_compact(token, None, self.registry)
        except _UNREADABLE:
            raise self._malformed() from None
        header = parsed.protected
        if not isinstance(header, dict) or "crit" in header or "b64" in header:
            # No extension is understood here (RFC 7515, section 4.1.11).
            raise self._malformed()
        if header["alg"] not in self.registry.allowed:  # type: ignore[operator]
            raise self._invalid("algorithm", "The algorithm of the token is not accepted.")
        kind = header.get("typ")
        if (kind.lower() if isinstance(kind, str) else kind) not in TYPES:
            raise self._invalid("type", "This is not an access token.")
        return parsed

    async def _find_key(self, header: Mapping[str, Any]) -> Key:
        """Return the key that a header names, if it is meant for the algorithm."""
        kid = header.get("kid")
        if not isinstance(kid, str | None):
            raise self._malformed()
        key = await self.keys.find(kid)
        if key is None:
            raise self._invalid("unknown_key", "The key of the token is not the issuer's.")
        if header["alg"] not in key.algorithms:
            raise self._invalid("algorithm", "The key of the token is for another algorithm.")
        return key

    def _check_signature(self, parsed: jws.CompactSignature, key: Key) -> None:
        try:
            is_valid = jws.validate_compact(parsed, key.public_key, registry=self.registry)
        except _UNREADABLE:
            is_valid = False
        if not is_valid:
            raise self._invalid("signature", "The signature of the token is not valid.")

    def _read_claims(self, payload: bytes) -> dict[str, Any]:
        try:
            claims: Any = orjson.loads(payload)
        except ValueError:
            raise self._malformed() from None
        if not isinstance(claims, dict):
            raise self._malformed()
        return claims

    def _check_claims(self, claims: Mapping[str, Any]) -> float:
        """Return when the token expires, the leeway included (RFC 9068, section 4)."""
        if claims.get("iss") != self.issuer:
            raise self._invalid("issuer", "The token is another issuer's.")
        audience = claims.get("aud")
        audiences = audience if isinstance(audience, list) else [audience]
        if self.audience not in audiences:
            raise self._invalid("audience", "The token is for another service.")
        now = time.time()
        expires_at = self._time(claims, "exp", required=True) + self.leeway
        if expires_at <= now:
            raise self._invalid("expired", "The token has expired.")
        valid_from = max(self._time(claims, "nbf"), self._time(claims, "iat"))
        if valid_from > now + self.leeway:
            raise self._invalid("not_yet_valid", "The token is not valid yet.")
        return expires_at

    def _time(self, claims: Mapping[str, Any], name: str, *, required: bool = False) -> float:
        """Return a time of the token (RFC 7519, section 2: NumericDate); 0 without it."""
        value = claims.get(name)
        if value is None and not required:
            return 0.0
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._invalid("claims", f"The token has no valid {name}.")
        return value

    def _principal(self, claims: Mapping[str, Any]) -> Principal:
        subject = claims.get("sub")
        if not _is_subject(subject):
            raise self._invalid("claims", "The token has no valid sub.")
        found = (claims.get(name) for name in CLIENT_CLAIMS)
        client_id = next((each for each in found if isinstance(each, str)), "")
        scopes = claims.get(self.scopes_claim, ())
        if isinstance(scopes, str):
            scopes = scopes.split()
        if not isinstance(scopes, list | tuple):
            scopes = ()
        names = frozenset(each for each in scopes if isinstance(each, str))
        return Principal(subject, str(self.issuer), client_id, names, claims)

    def _malformed(self) -> InvalidTokenError:
        return self._invalid("malformed", "The token cannot be read.")

    def _invalid(self, reason: str, detail: str) -> InvalidTokenError:
        return InvalidTokenError(self.realm, reason, detail)


def _is_subject(value: object) -> TypeGuard[str]:
    """Return whether a claim can name a caller; Postgres stores no NUL."""
    if not isinstance(value, str) or not value.isprintable():
        return False
    return 0 < len(value) <= MAX_SUBJECT_CHARACTERS
