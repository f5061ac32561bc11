"""The live view for `make dev WATCH=1`."""

import contextlib
import os
import subprocess
from collections.abc import Iterator

from app.settings import Settings
from scripts import dev_child

#: Where the other processes of `make dev`, such as a worker, serve their metrics.
others: list[str] = []


@contextlib.contextmanager
def watching(settings: Settings) -> Iterator[None]:
    """Serve the view of the service during the block, if `WATCH` is set."""
    if os.environ.get("WATCH", "0") in {"", "0"}:
        yield
        return
    metrics = [settings.metrics_bind, *others]
    addresses = {
        "SERVICE": f"http://{settings.bind}{settings.root_path}",
        "METRICS": " ".join(f"http://{address}/metrics" for address in metrics),
    }
    # Not this command's stdin, which is that of a debugger.
    child = dev_child.start("scripts.watch", env=os.environ | addresses, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        dev_child.stop(child)
