"""The newest log lines of a stream, such as a pipe from the service.

A busy service writes thousands of access lines a second. They are read, so that the service never
waits, but only the newest are parsed and shown.
"""

import json
import threading
import time
from collections import deque
from typing import IO, Any

from scripts.watch.view import View

SHOW_SECONDS = 0.25
#: Lines that are shown at once, of each of the two sorts.
MAX_SHOWN = 12
MAX_BYTES = 4_096
#: The spellings of `json.dumps` and of orjson.
ACCESS = (b'"logger": "access"', b'"logger":"access"')


class Lines:
    """Reads lines in one thread, and shows the newest in another."""

    def __init__(self, view: View, source: IO[bytes]) -> None:
        self.view = view
        self.source = source
        self.lock = threading.Lock()
        #: Access lines, which may push each other out, but none of the others.
        self.access: deque[bytes] = deque(maxlen=MAX_SHOWN)
        self.others: deque[bytes] = deque(maxlen=MAX_SHOWN)
        self.has_ended = False

    def start(self) -> None:
        """Start both threads."""
        for target in (self._read, self._show):
            threading.Thread(target=target, daemon=True).start()

    def _read(self) -> None:
        for line in self.source:
            is_access = any(text in line for text in ACCESS)
            with self.lock:
                (self.access if is_access else self.others).append(line)
        self.has_ended = True

    def _show(self) -> None:
        while not self.has_ended or self.access or self.others:
            time.sleep(SHOW_SECONDS)
            with self.lock:
                lines = [*self.others, *self.access]
                self.access.clear()
                self.others.clear()
            if lines:
                self.view.add("line", [entry(line) for line in lines])


def entry(line: bytes) -> dict[str, Any]:
    """Return a line for the page: its fields if it is JSON, else its text."""
    text = line[:MAX_BYTES].decode(errors="replace").rstrip("\r\n")
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return {"message": text}
    if not isinstance(fields, dict) or "message" not in fields:
        return {"message": text}
    shown = {name: str(fields.get(name, ""))[:MAX_BYTES] for name in ("level", "logger", "message")}
    if fields.get("logger") == "access":
        names = ("method", "path", "status", "duration_ms")
        shown["message"] = " ".join(str(fields.get(name, ""))[:200] for name in names) + " ms"
    return {
        **shown,
        "pid": fields.get("pid"),
        "at": str(fields.get("timestamp", ""))[11:23],
        "request_id": str(fields.get("request_id") or "")[:64],
    }
