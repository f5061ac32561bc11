"""Exemplars of the latency histogram: for each bucket the newest trace, over all workers.

prometheus_client has none with several processes. Each worker writes its own into a file in the
metrics directory; multiprocess.py adds the newest to a scrape, which shows them in OpenMetrics.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import orjson
from prometheus_client import Metric
from prometheus_client.samples import Exemplar, Sample

from app.telemetry.metric_files import replace_file
from app.telemetry.metrics_directory import VARIABLE

#: Method, route and status of a request.
Labels = tuple[str, str, int]
#: The same as texts, and the upper bound of its bucket.
Key = tuple[str, ...]
#: The Unix time, the seconds of the request, the IDs of its trace and span.
Entry = tuple[float, float, str, str]
_NAME = "exemplars_{}.json"


class Exemplars:
    """The exemplars of one worker."""

    def __init__(self) -> None:
        self.newest: dict[tuple[Labels, str], Entry] = {}
        self.is_changed = False

    def note(self, labels: Labels, bound: str, seconds: float, ids: Mapping[str, str]) -> None:
        """Keep a traced request as the exemplar of its bucket, until there is a newer one."""
        self.newest[labels, bound] = (time.time(), seconds, ids["trace_id"], ids["span_id"])
        self.is_changed = True

    def write(self) -> None:
        """Write the file of this worker. A full disk costs the exemplars, not the request."""
        directory = os.environ.get(VARIABLE)
        if directory is not None:
            path = Path(directory, _NAME.format(os.getpid()))
            content = [
                ((*map(str, labels), bound), entry)
                for (labels, bound), entry in self.newest.items()
            ]
            with contextlib.suppress(OSError):
                replace_file(path, orjson.dumps(content))
        self.is_changed = False


def files(directory: Path) -> dict[Path, str]:
    """Return the files of exemplars, each with the pid of its worker."""
    paths = directory.glob(_NAME.format("*"))
    return {path: path.stem.partition("_")[2] for path in paths}


def read(paths: Iterable[Path]) -> dict[Key, Exemplar]:
    """Return the newest exemplar of each bucket."""
    found: dict[Key, Entry] = {}
    for path in paths:
        # It may be deleted meanwhile.
        with contextlib.suppress(OSError, ValueError):
            for key, entry in orjson.loads(path.read_bytes()):
                bucket = tuple(key)
                found[bucket] = max(tuple(entry), found.get(bucket, (0.0,)))
    return {
        key: Exemplar({"trace_id": trace_id, "span_id": span_id}, seconds, at)
        for key, (at, seconds, trace_id, span_id) in found.items()
    }


def add(metric: Metric, exemplars: dict[Key, Exemplar], names: tuple[str, ...]) -> None:
    """Add exemplars to the buckets of a histogram; `names` are its labels in the order of a key."""

    def with_exemplar(sample: Sample) -> Sample:
        bound = sample.labels.get("le")
        key = (*(sample.labels.get(name, "") for name in names), bound or "")
        return sample._replace(exemplar=exemplars.get(key)) if bound else sample

    metric.samples = [with_exemplar(sample) for sample in metric.samples]
