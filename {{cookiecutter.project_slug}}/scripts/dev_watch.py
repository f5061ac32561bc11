"""The live view for `make dev WATCH=1`, and for labs."""

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence

from app.settings import Settings
from scripts import dev_child

#: Where the other processes of `make dev`, such as a worker, serve their metrics.
others: list[str] = []


@contextlib.contextmanager
def watching(settings: Settings) -> Iterator[None]:
    """Serve the view of the service during the block, if `WATCH` is set."""
    service = f"http://{settings.bind}{settings.root_path}"
    with showing(service, [settings.metrics_bind, *others]):
        yield


@contextlib.contextmanager
def showing(service: str, metrics: Sequence[str]) -> Iterator[None]:
    """Serve a view during the block, if `WATCH` is set. `metrics`: addresses that serve metrics."""
    if os.environ.get("WATCH", "0") in {"", "0"}:
        yield
        return
    urls = " ".join(f"http://{address}/metrics" for address in metrics)
    environment = os.environ | {"SERVICE": service, "METRICS": urls}
    # Not this command's stdin, which is that of a debugger.
    child = dev_child.start("scripts.watch", env=environment, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        dev_child.stop(child)
