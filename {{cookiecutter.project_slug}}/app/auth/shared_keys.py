"""The last keys of the issuer, shared with the other workers of the pod, and with later ones.

Workers are replaced after `MAX_REQUESTS`. Without this, one that starts while the provider hangs
would know no key, and respond 503 to callers that the one before it knew. The file is in the
directory of the metrics, which is in memory and is the service's alone.
"""

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import orjson

from app.settings import Settings

NAME = "issuer_keys.json"


class Fetched(NamedTuple):
    """A JWK Set, as it was fetched."""

    document: str
    #: The time for which it may be kept.
    age_seconds: float
    #: When it was fetched, by `time.time()`.
    fetched_at: float


class SharedKeys:
    """The file with the keys. A process without the directory has none."""

    def __init__(self, settings: Settings) -> None:
        directory = settings.prometheus_multiproc_dir
        self.path: Path | None = directory / NAME if directory else None
        #: Keys of another issuer, from before a restart with other settings, do not count.
        self.origin = [settings.auth_issuer, settings.auth_jwks_url]

    def read(self) -> Fetched | None:
        """Return the last keys; None without a valid file."""
        if self.path is None:
            return None
        try:
            origin, *fetched = orjson.loads(self.path.read_bytes())
            return Fetched(*fetched) if origin == self.origin else None
        except (OSError, ValueError, TypeError):
            return None

    def write(self, fetched: Fetched) -> None:
        """Replace the file, unless the directory is full or gone: other workers then fetch."""
        if self.path is None:
            return
        own = self.path.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):
            own.write_bytes(orjson.dumps([self.origin, *fetched]))
            own.replace(self.path)
