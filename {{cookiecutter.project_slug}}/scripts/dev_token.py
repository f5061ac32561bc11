"""Print a token for the service of `make dev AUTH=1`.

Usage: `python -m scripts.dev_token`, with SCOPES, SUBJECT and SECONDS in the environment.
"""

import os
import sys
import time

from joserfc import jwt

from app.settings import load_settings
from scripts import dev_issuer

DEFAULT_SECONDS = 3600


def mint(scopes: str, subject: str, seconds: int) -> str:
    """Return a token: RFC 9068, section 2."""
    settings = load_settings()
    key = dev_issuer.load_key()
    now = int(time.time())
    header = {"alg": dev_issuer.ALGORITHM, "typ": "at+jwt", "kid": key.kid}
    claims = {
        "iss": dev_issuer.ISSUER,
        "aud": dev_issuer.audience(settings),
        "sub": subject,
        "client_id": subject,
        "iat": now,
        "exp": now + seconds,
        settings.auth_scopes_claim: scopes,
    }
    return jwt.encode(header, claims, key)


def main() -> None:
    """Print the token. Raises `SystemExit` with one line for an invalid number of seconds."""
    text = os.environ.get("SECONDS") or str(DEFAULT_SECONDS)
    if not text.isdecimal() or int(text) == 0:
        sys.exit(f"SECONDS={text}: must be a number of seconds, for example {DEFAULT_SECONDS}")
    scopes = " ".join(os.environ.get("SCOPES", "").replace(",", " ").split())
    sys.stdout.write(mint(scopes, os.environ.get("SUBJECT") or "developer", int(text)) + "\n")


if __name__ == "__main__":
    main()
