"""The issuer of development: its key is on this machine, and only `make dev AUTH=1` trusts it.

The private key is in `.dev`, or in `DEV_DIRECTORY`, and only its owner can read it.
"""

import contextlib
import json
import os
import secrets
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from joserfc.jwk import ECKey, KeyParameters

from app.settings import Settings, fail, load_settings
from scripts import dev_data
from scripts.local_page import LocalPage

#: Outside development it is a configuration error, since it is not https.
ISSUER = "http://issuer.localhost"
ALGORITHM = "ES256"


def audience(settings: Settings) -> str:
    """Return the audience of the tokens: the service's own, if no setting names one."""
    return settings.auth_audience or settings.service_name


def load_key(directory: Path | None = None) -> ECKey:
    """Return the key of this machine. The first call creates it, with mode 600."""
    path = (directory or dev_data.directory()) / "issuer.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _create_key(path)
    return ECKey.import_key(json.loads(path.read_text()))


def _create_key(path: Path) -> None:
    kid = f"development-{secrets.token_hex(4)}"
    parameters: KeyParameters = {"kid": kid, "alg": ALGORITHM, "use": "sig"}
    key = ECKey.generate_key("P-256", parameters)
    new = path.with_suffix(f".{os.getpid()}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(key.as_dict(private=True), file)
    # Another command may have created one meanwhile, which stays.
    with contextlib.suppress(FileExistsError):
        path.hardlink_to(new)
    new.unlink()


class _Keys(LocalPage):
    """`GET /keys`: the public key."""

    document: bytes

    def get(self, path: str) -> None:
        """Respond with the keys, to any path."""
        self.respond(200, self.document, "application/json")


@contextlib.contextmanager
def issuing() -> Iterator[str]:
    """Have the service trust the issuer during the block, if `AUTH` is set.

    Yields what the guide says about it. Raises `SystemExit` if the settings name another issuer.
    """
    settings = load_settings()
    if os.environ.get("AUTH", "0") in {"", "0"}:
        yield f"of {settings.auth_issuer}" if settings.auth_issuer else "`make dev AUTH=1`"
        return
    if settings.auth_issuer:
        fail("AUTH_ISSUER", settings.auth_issuer, "must be unset, since AUTH=1 uses its own")
    with _serving_keys() as url:
        os.environ["AUTH_AUDIENCE"] = audience(settings)
        os.environ["AUTH_ISSUER"] = ISSUER
        os.environ["AUTH_JWKS_URL"] = url
        yield '`make token SCOPES="orders:read orders:write"`'


@contextlib.contextmanager
def _serving_keys() -> Iterator[str]:
    """Serve the public key during the block, in a thread; yield its URL."""
    keys: dict[str, Any] = {"keys": [load_key().as_dict(private=False)]}
    handler = type("Keys", (_Keys,), {"document": json.dumps(keys).encode()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/keys"
        finally:
            server.shutdown()
