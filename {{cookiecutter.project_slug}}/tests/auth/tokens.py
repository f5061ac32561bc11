"""Tokens of any shape: JSON Web Tokens (RFC 7519), signed here, since no library mints bad ones.

`mint(key)` returns a valid access token (RFC 9068); each argument makes it differ from one.
"""

import base64
import functools
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

#: The value of a header parameter or a claim that the token is to lack.
MISSING: Final = object()
ISSUER = "https://issuer.example"
AUDIENCE = "test-service"
LIFETIME_SECONDS = 300
ALGORITHMS = ("RS256", "ES256", "EdDSA")
Sign = Callable[[bytes], bytes]


@dataclass(frozen=True)
class SigningKey:
    """A key of a provider: its public part as in a JWKS (RFC 7517) and as PEM, and its use."""

    kid: str
    algorithm: str
    sign: Sign
    parameters: Mapping[str, str]
    public_pem: bytes = b""

    @property
    def jwk(self) -> dict[str, str]:
        """The key in a JWKS."""
        return {**self.parameters, "kid": self.kid, "alg": self.algorithm, "use": "sig"}


@functools.cache
def signing_key(algorithm: str = "ES256", kid: str = "") -> SigningKey:
    """Return the key of this name, the same each time. A new RSA key needs 0.1 s."""
    create = {"RS256": _rsa, "ES256": _ec, "EdDSA": _ed25519}[algorithm]
    return create(kid or algorithm.lower())


def weak_key(kid: str = "weak") -> SigningKey:
    """Return an RSA key of 512 bits, which `cryptography` neither generates nor signs with."""
    modulus = int(
        "c38022110107c3d9f38405847a11848af49f43d3921288c313342d51916c06d8"
        "91816b3ba051259f8891c00eb35dd35a43e6d3f7d4f46f2e1d7314da9069be4d",
        16,
    )
    private_exponent = int(
        "96570cdb82ad54016170df455711ed996630abda2174bb53388b61665eac723d"
        "f3e7c2d71a3f184d4b0b5993a98e79e4db146b9d4c945b309a6801bbb907d841",
        16,
    )

    def sign(data: bytes) -> bytes:
        # EMSA-PKCS1-v1_5 with SHA-256: RFC 8017, section 9.2
        digest_info = bytes.fromhex("3031300d060960864801650304020105000420")
        encoded = digest_info + hashlib.sha256(data).digest()
        padded = b"\0\1" + b"\xff" * (61 - len(encoded)) + b"\0" + encoded
        signature = pow(int.from_bytes(padded), private_exponent, modulus)
        return signature.to_bytes(64)

    return SigningKey(kid, "RS256", sign, _rsa_parameters(modulus, 65537))


def mint(
    key: SigningKey,
    header: Mapping[str, object] | None = None,
    sign: Sign | None = None,
    **claims: object,
) -> str:
    """Return a token that is valid for `LIFETIME_SECONDS`, but for the changes.

    `header` and `claims` replace or add single members, and `MISSING` removes one. `sign` signs in
    place of the key, for example `unsigned` or `hmac_with(key.public_pem)`.
    """
    now = int(time.time())
    base_header = {"alg": key.algorithm, "typ": "at+jwt", "kid": key.kid}
    base_claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "client-1",
        "iat": now,
        "exp": now + LIFETIME_SECONDS,
    }
    return encode(
        _changed(base_header, header or {}), _changed(base_claims, claims), sign or key.sign
    )


def encode(header: object, claims: object, sign: Sign) -> str:
    """Return the compact serialization (RFC 7515, section 7.1) of any two JSON values."""
    data = f"{to_base64(_to_json(header))}.{to_base64(_to_json(claims))}"
    return f"{data}.{to_base64(sign(data.encode()))}"


def unsigned(_: bytes) -> bytes:
    """Return the signature of `alg: none`."""
    return b""


def hmac_with(secret: bytes) -> Sign:
    """Return the signature of HS256."""
    return lambda data: hmac.digest(secret, data, hashlib.sha256)


def to_base64(data: bytes) -> str:
    """Return base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _changed(base: Mapping[str, object], changes: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in {**base, **changes}.items() if value is not MISSING}


def _to_json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _rsa(kid: str) -> SigningKey:
    private = rsa.generate_private_key(65537, 2048)
    numbers = private.public_key().public_numbers()

    def sign(data: bytes) -> bytes:
        signature: bytes = private.sign(data, padding.PKCS1v15(), SHA256())
        return signature

    parameters = _rsa_parameters(numbers.n, numbers.e)
    return SigningKey(kid, "RS256", sign, parameters, _pem(private.public_key()))


def _rsa_parameters(modulus: int, exponent: int) -> dict[str, str]:
    length = (modulus.bit_length() + 7) // 8
    return {
        "kty": "RSA",
        "n": to_base64(modulus.to_bytes(length)),
        "e": to_base64(exponent.to_bytes(3)),
    }


def _ec(kid: str) -> SigningKey:
    private = ec.generate_private_key(ec.SECP256R1())
    numbers = private.public_key().public_numbers()

    def sign(data: bytes) -> bytes:
        # Both numbers in 32 bytes: RFC 7518, section 3.4
        numbers = decode_dss_signature(private.sign(data, ec.ECDSA(SHA256())))
        return b"".join(number.to_bytes(32) for number in numbers)

    parameters = {
        "kty": "EC",
        "crv": "P-256",
        "x": to_base64(numbers.x.to_bytes(32)),
        "y": to_base64(numbers.y.to_bytes(32)),
    }
    return SigningKey(kid, "ES256", sign, parameters, _pem(private.public_key()))


def _ed25519(kid: str) -> SigningKey:
    private = ed25519.Ed25519PrivateKey.generate()
    public = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    parameters = {"kty": "OKP", "crv": "Ed25519", "x": to_base64(public)}
    return SigningKey(kid, "EdDSA", private.sign, parameters, _pem(private.public_key()))


def _pem(public_key: Any) -> bytes:
    pem: bytes = public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem
