"""The events of the page: what is different from before."""

from typing import Any

from scripts.watch.sample import Sample

#: How an exit of a worker is named, by its reason in `worker_exits_total`.
EXITS = {
    "recycled": "recycled after MAX_REQUESTS",
    "stopped": "stopped",
    "timeout": "killed: its event loop was blocked",
    "crashed": "crashed, or was killed",
}
READINESS = {
    "ready": "ready",
    "draining": "draining: balancers send no new requests",
    "not_ready": "not ready",
    "waiting": "the readiness probe gets no response yet",
    "down": "nothing listens",
}

Event = dict[str, Any]


def _event(text: str, level: str = "info") -> Event:
    return {"text": text, "level": level}


class Changes:
    """Compares each observation with the one before. The first one is no change."""

    def __init__(self) -> None:
        self.sample: Sample | None = None
        self.state = ""
        self.failed: frozenset[str] = frozenset()
        self.exhausted: set[str] = set()
        self.is_missing = False

    def of_probe(self, probe: dict[str, Any]) -> list[Event]:
        """Return the events of a readiness probe: another state, or other failed checks."""
        state = probe["state"]
        failed = frozenset(probe["failed"])
        before = (self.state, self.failed)
        self.state = state
        self.failed = failed
        if before == (state, failed) or (state == "ready" and not before[0]):
            return []
        names = f": {', '.join(sorted(failed))}" if failed and state != "draining" else ""
        level = {"ready": "good", "draining": "warning", "waiting": "warning"}.get(state, "bad")
        return [_event(READINESS[state] + names, level)]

    def of_sample(self, sample: Sample) -> list[Event]:
        """Return the events since the last sample: workers, pools and dependencies."""
        before = self.sample
        self.sample = sample
        events = self._pools(sample)
        if before is not None:
            events += _exits(before, sample)
            events += _workers(before, sample)
            events += _dependencies(before, sample)
            events += self._timeouts(before, sample)
        return events

    def _timeouts(self, before: Sample, sample: Sample) -> list[Event]:
        """Return an event for the first of several samples in a row with timeouts."""
        was_missing = self.is_missing
        self.is_missing = (sample["timeouts"] or 0) > (before["timeouts"] or 0)
        if was_missing or not self.is_missing:
            return []
        return [_event("callers get no connection in time", "bad")]

    def _pools(self, sample: Sample) -> list[Event]:
        events = []
        for name, pool in sample["pools"].items():
            is_exhausted = pool["waiting"] > 0
            if is_exhausted and name not in self.exhausted:
                use = f"{pool['used']:g} of {pool['max']:g} in use, {pool['waiting']:g} wait"
                events.append(_event(f"the pool of {name} is exhausted: {use}", "bad"))
                self.exhausted.add(name)
            elif not is_exhausted and name in self.exhausted:
                events.append(_event(f"nobody waits for the pool of {name} any more", "good"))
                self.exhausted.remove(name)
        return events


def _exits(before: Sample, sample: Sample) -> list[Event]:
    events = []
    for reason, value in sample["exits"].items():
        number = value - before["exits"].get(reason, 0)
        if number > 0:
            level = "info" if reason in {"recycled", "stopped"} else "bad"
            workers = "a worker was" if number == 1 else f"{number:g} workers were"
            text = EXITS.get(reason, reason)
            events.append(_event(f"{workers} {text}".replace("was crashed", "crashed"), level))
    return events


def _workers(before: Sample, sample: Sample) -> list[Event]:
    old, new = before["memory"].keys(), sample["memory"].keys()
    return [_event(f"worker {pid} has ended") for pid in sorted(old - new)] + [
        _event(f"worker {pid} serves", "good") for pid in sorted(new - old)
    ]


def _dependencies(before: Sample, sample: Sample) -> list[Event]:
    events = []
    for name, is_up in sample["dependencies"].items():
        was_up = before["dependencies"].get(name, is_up)
        if is_up < was_up:
            events.append(_event(f"{name} is unavailable", "bad"))
        elif is_up > was_up:
            events.append(_event(f"{name} is available again", "good"))
    return events
