"""Reads a JWK Set (RFC 7517): the public keys of the issuer that can verify tokens."""

from typing import Any, NamedTuple

import orjson
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, OKPKey, RSAKey

#: NIST SP 800-131A, revision 2, disallows smaller ones; larger ones need over 1 ms for a signature.
MIN_RSA_BITS = 2048
MAX_RSA_BITS = 8192
#: Providers have two to four keys.
MAX_KEYS = 100
#: The algorithms of each type of key, by its curve if it has one.
ALGORITHMS: dict[Any, frozenset[str]] = {
    ("RSA", None): frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}),
    ("EC", "P-256"): frozenset({"ES256"}),
    ("EC", "P-384"): frozenset({"ES384"}),
    ("EC", "P-521"): frozenset({"ES512"}),
    ("OKP", "Ed25519"): frozenset({"EdDSA", "Ed25519"}),
}
_CLASSES: dict[Any, Any] = {"RSA": RSAKey, "EC": ECKey, "OKP": OKPKey}
#: The members of a public key. A private one would be a mistake of the provider; it is not kept.
_PUBLIC_MEMBERS = ("kty", "n", "e", "crv", "x", "y")


class Key(NamedTuple):
    """A public key, and the algorithms that it may be used with (RFC 8725, section 3.1)."""

    public_key: Any
    algorithms: frozenset[str]
    #: The members that it was made of, by which a changed key is noticed.
    members: dict[str, Any]


def parse_keys(document: str | bytes) -> tuple[dict[str | None, Key], list[str]]:
    """Return the usable keys by `kid`, and why others are not usable.

    Raises `ValueError` if the document is no JWK Set.
    """
    parsed = orjson.loads(document)
    found = parsed.get("keys") if isinstance(parsed, dict) else None
    if not isinstance(found, list) or len(found) > MAX_KEYS:
        msg = f"not a set of at most {MAX_KEYS} keys"
        raise ValueError(msg)
    keys: dict[str | None, Key] = {}
    problems = []
    for jwk in found:
        try:
            kid, key = _parse_key(jwk)
            if kid in keys:
                problems.append(f"{kid!r:.100}: another key has the same kid")
            keys.setdefault(kid, key)
        except (ValueError, TypeError, KeyError, AttributeError, JoseError) as error:
            kid = jwk.get("kid") if isinstance(jwk, dict) else None
            problems.append(f"{kid!r:.100}: {error!s:.100}")
    return keys, problems


def _parse_key(jwk: dict[str, Any]) -> tuple[str | None, Key]:
    """Return a key and its ID. Raises an error if it cannot verify tokens."""
    kid = jwk.get("kid")
    if not isinstance(kid, str | None):
        msg = "its kid is not a text"
        raise TypeError(msg)
    if jwk.get("use", "sig") != "sig" or "verify" not in jwk.get("key_ops", ["verify"]):
        msg = "it is not for signatures"
        raise ValueError(msg)
    algorithms = ALGORITHMS.get((jwk.get("kty"), jwk.get("crv")), frozenset[str]())
    if "alg" in jwk:
        algorithms &= {jwk["alg"]}
    if not algorithms:
        msg = f"no algorithm for kty {jwk.get('kty')}, crv {jwk.get('crv')}, alg {jwk.get('alg')}"
        raise ValueError(msg)
    members = {name: jwk[name] for name in _PUBLIC_MEMBERS if name in jwk}
    key = _CLASSES[jwk["kty"]].import_key(members)
    bits = key.get_op_key("verify").key_size if jwk["kty"] == "RSA" else MIN_RSA_BITS
    if not MIN_RSA_BITS <= bits <= MAX_RSA_BITS:
        msg = f"RSA of {bits} bits"
        raise ValueError(msg)
    return kid, Key(key, algorithms, members)
