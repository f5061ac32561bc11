"""The bounded history, from which each open page is fed."""

import json
import threading
import time
from collections import deque
from typing import Any

#: Entries that are kept of each kind. The page shows two minutes; a page that is opened, or that
#: was disconnected, gets them at once.
KEPT = {"sample": 200, "probe": 400, "event": 100, "line": 100, "setup": 1}


class View:
    """The newest entries of each kind, numbered in the order of their arrival."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.number = 0
        self.kept: dict[str, deque[tuple[int, str]]] = {
            kind: deque(maxlen=size) for kind, size in KEPT.items()
        }

    def add(self, kind: str, entries: list[dict[str, Any]]) -> None:
        """Add entries, and wake the pages."""
        now = round(time.time() * 1000)
        with self.changed:
            for entry in entries:
                self.number += 1
                text = json.dumps({"kind": kind, "time": now} | entry)
                self.kept[kind].append((self.number, text))
            self.changed.notify_all()

    def after(self, number: int, seconds: float) -> tuple[int, list[str]]:
        """Wait for entries after this number; return the newest number, and the entries.

        Without one in time, there are none. A number of an earlier run counts as 0.
        """
        with self.changed:
            if number > self.number:
                number = 0
            self.changed.wait_for(lambda: self.number > number, seconds)
            found = [each for kept in self.kept.values() for each in kept if each[0] > number]
            return self.number, [text for _, text in sorted(found)]
