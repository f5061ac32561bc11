"""Print log lines for people: `kubectl logs deploy/service | make logs`.

Lines of JSON become a line of text, with the traceback of an exception below it. All others are
printed as they are.
"""

import json
import sys
from typing import Any

#: Keys that are not repeated among the fields.
SHOWN = {"timestamp", "level", "logger", "message", "service", "pid", "exception", "stack"}


def pretty(line: str) -> str:
    """Return a log line as text; one that is no log line stays as it is."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return line
    if not isinstance(entry, dict) or "message" not in entry:
        return line
    return "\n".join([_first_line(entry), *_more_lines(entry)])


def _first_line(entry: dict[str, Any]) -> str:
    # 2026-01-31T12:30:15.123Z: the time of day
    time = str(entry.get("timestamp", ""))[11:23]
    level = str(entry.get("level", "")).upper()
    fields = [f"{name}={value}" for name, value in entry.items() if name not in SHOWN]
    start = f"{time} {level:<8} {entry.get('logger', '')}: {entry['message']}"
    return " ".join([start, *fields])


def _more_lines(entry: dict[str, Any]) -> list[str]:
    exception = entry.get("exception")
    trace = exception.get("traceback") if isinstance(exception, dict) else exception
    return [str(text).rstrip() for text in (trace, entry.get("stack")) if text]


def main() -> None:
    """Print the lines of stdin as they come, until its end or Ctrl-C."""
    try:
        for data in sys.stdin.buffer:
            line = data.decode(errors="replace").rstrip("\r\n")
            text = pretty(line) + "\n"
            sys.stdout.buffer.write(text.encode(errors="replace"))
            sys.stdout.buffer.flush()
    except (KeyboardInterrupt, BrokenPipeError):
        # The reader of the output has ended, such as `head`. Python would report it at its exit.
        sys.stderr.close()


if __name__ == "__main__":
    main()
