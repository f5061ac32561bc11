"""Run a command with the Postgres and Redis of development.

`DATABASE_URL` and `REDIS_URL` in the environment, or in `SECRETS_DIR`, are used as they are. The
command gets the URL of a server of scripts/dev_data.py for each that is not set.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from scripts.dev_data import servers
from scripts.parent import Parent

URLS = ("DATABASE_URL", "REDIS_URL")
#: How often a command checks that its parent, such as make, still runs.
PARENT_CHECK_SECONDS = 0.5


@contextlib.contextmanager
def environment() -> Iterator[dict[str, str]]:
    """Yield the environment, with the URLs of servers that run during the block.

    Empty variables count as unset, since gunicorn parses even an empty `WEB_CONCURRENCY` as a
    number.
    """
    variables = {name: value for name, value in os.environ.items() if value}
    secret_files = {path.name for path in Path(variables.get("SECRETS_DIR", os.devnull)).glob("*")}
    missing = {
        name for name in URLS if name not in variables and not {name, name.lower()} & secret_files
    }
    if not missing:
        yield variables
        return
    with servers(missing) as urls:
        yield variables | urls


class Signals:
    """The signals that end a command: Ctrl-C, the stop button of an editor, a closed terminal."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        """Take the signals. None of them interrupts the start or the stop of the servers."""
        self.parent = Parent()
        self.received: list[int] = []
        self.child: subprocess.Popen[bytes] | None = None
        for number in self.NUMBERS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received.append(number)
        # A terminal sends Ctrl-C to the command as well, which decides whether to exit.
        if self.child and number != signal.SIGINT:
            self.stop(self.child, number)

    def stop(self, child: "subprocess.Popen[bytes]", number: int = signal.SIGTERM) -> None:
        """End the command. To gunicorn SIGHUP means a reload, to a shell SIGTERM nothing."""
        child.send_signal(number)
        child.send_signal(signal.SIGTERM)

    def wait(self, child: "subprocess.Popen[bytes]") -> int:
        """Wait for the command and return its exit code. It ends with the parent of this one."""
        self.child = child
        if self.received:
            self.stop(child)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.wait(PARENT_CHECK_SECONDS)
                return code if code >= 0 else 128 - code
            if not self.parent.is_running:
                self.stop(child, signal.SIGHUP)


def main(command: list[str]) -> int:
    """Run the command between start and stop of the servers; return its exit code."""
    if not command or command[0] in {"-h", "--help"}:
        sys.exit(f"{__doc__}\nusage: python -m scripts.dev_environment COMMAND [ARGUMENT ...]")
    signals = Signals()
    with environment() as variables:
        # Signals during the start of the servers, which takes a second, take effect after it.
        if signals.received:
            return 128 + signals.received[0]
        return signals.wait(subprocess.Popen(command, env=variables))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
