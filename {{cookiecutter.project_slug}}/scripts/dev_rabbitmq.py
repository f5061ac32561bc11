"""A temporary RabbitMQ of this project's own, without Docker: `python -m scripts.dev_rabbitmq`.

It needs `rabbitmq-server`, which `apt-get install rabbitmq-server` and `brew install rabbitmq`
bring. Its node, port mapper, data, cookie and log are its own, all on the loopback interface, and
it runs as root or as any other user. Nothing is left of it, even if its parent is killed.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from scripts import dev_child
from scripts.dev_services import free_port, wait_until_listening
from scripts.parent import Parent

#: Debian's program on PATH is a wrapper for root, which becomes another user.
DEBIAN_PROGRAMS = Path("/usr/lib/rabbitmq/bin")
NO_RABBITMQ = (
    "no rabbitmq-server: `apt-get install rabbitmq-server` or `brew install rabbitmq`, or unset"
    " AMQP_URL, and Postgres hands out the jobs"
)
SETTINGS = {
    "log.console": "false",
    "log.file.level": "warning",
    # Not a part of the machine's memory, of which a container may have less.
    "vm_memory_high_watermark.absolute": "512MB",
    "disk_free_limit.absolute": "50MB",
}
#: Erlang's schedulers sleep when they have nothing to do. By default they spin first.
ERLANG_ARGUMENTS = (
    "+sbwt none +sbwtdcpu none +sbwtdio none -kernel inet_dist_use_interface {127,0,0,1}"
)
#: Pause between two looks at the server, and for a signal.
KEEP_SECONDS = 0.1
#: The signals that end the command: Ctrl-C, `kill`, a closed terminal.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def find_program(name: str = "rabbitmq-server") -> str | None:
    """Return the path of a program of RabbitMQ, or None."""
    debian = DEBIAN_PROGRAMS / name
    return str(debian) if debian.exists() else shutil.which(name)


class RabbitMQ:
    """A RabbitMQ server on the loopback interface, with its data in a directory."""

    def __init__(self, directory: Path, **settings: str) -> None:
        """`settings` are lines of rabbitmq.conf, with two underscores in place of a dot.

        Raises `SystemExit` if RabbitMQ is not installed.
        """
        program = find_program()
        if program is None:
            sys.exit(NO_RABBITMQ)
        self.program = program
        self.directory = directory
        self.port = free_port()
        self.password = secrets.token_urlsafe(12)
        self.url = f"amqp://app:{self.password}@127.0.0.1:{self.port}/"
        self.environment = self._environment(free_port(), free_port())
        own = {name.replace("__", "."): value for name, value in settings.items()}
        self._write_files(SETTINGS | own)

    def _write_files(self, settings: dict[str, str]) -> None:
        user = {"default_user": "app", "default_pass": self.password}
        listener = {"listeners.tcp.1": f"127.0.0.1:{self.port}"}
        lines = [f"{name} = {value}\n" for name, value in (settings | user | listener).items()]
        file = self.directory / "rabbitmq.conf"
        file.touch(mode=0o600)
        file.write_text("".join(lines))
        (self.directory / "plugins").write_text("[].\n")
        (self.directory / "environment").touch()

    def _environment(self, distribution_port: int, mapper_port: int) -> dict[str, str]:
        """Return the variables of its programs: none names the machine's own server."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not re.match("RABBITMQ_|ERL_", name)
        }
        files = {
            "CONF_ENV_FILE": "environment",
            "CONFIG_FILE": "rabbitmq",
            "CONFIG_FILES": "conf.d",
            "ADVANCED_CONFIG_FILE": "advanced",
            "ENABLED_PLUGINS_FILE": "plugins",
            "MNESIA_BASE": "data",
            "LOG_BASE": "log",
            "PID_FILE": "pid",
        }
        paths = {f"RABBITMQ_{name}": str(self.directory / file) for name, file in files.items()}
        return (
            inherited
            | paths
            | {
                # Erlang keeps its cookie there.
                "HOME": str(self.directory),
                "LC_ALL": "C.UTF-8",
                "RABBITMQ_NODENAME": f"temporary-{self.port}@localhost",
                "RABBITMQ_NODE_PORT": str(self.port),
                "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
                "RABBITMQ_DIST_PORT": str(distribution_port),
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": ERLANG_ARGUMENTS,
                # Without it the script of the server is a second process, which waits for Erlang.
                "RUNNING_UNDER_SYSTEMD": "true",
                "ERL_EPMD_ADDRESS": "127.0.0.1",
                "ERL_EPMD_PORT": str(mapper_port),
                # Each Erlang, that of rabbitmqctl too, would start a mapper, which outlives it.
                "ERL_ZFLAGS": "-start_epmd false",
            }
        )

    def start(self) -> None:
        """Start and wait until it listens. Raises `SystemExit` if that fails."""
        self.process = dev_child.start(
            "scripts.dev_rabbitmq",
            "keep",
            str(os.getpid()),
            str(self.directory),
            self.program,
            cwd=Path(__file__).parent.parent,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        is_listening = False
        try:
            is_listening = wait_until_listening(self.port, lambda: self.process.poll() is None)
        finally:
            # After Ctrl-C too.
            if not is_listening:
                self.stop()
        if not is_listening:
            log = (self.directory / "output").read_text(errors="replace")[-2000:]
            sys.exit(f"the temporary RabbitMQ does not listen on port {self.port}:\n{log}")

    def stop(self) -> None:
        """Stop and wait, without a graceful shutdown: its data has to survive a crash anyway."""
        dev_child.stop(self.process)

    def kill(self) -> None:
        """End the server with SIGKILL, and wait for the process that keeps it."""
        os.kill(self.pid, signal.SIGKILL)
        self.process.wait()

    def control(self, *arguments: str) -> str:
        """Run rabbitmqctl, which takes about 2 s; return its output."""
        command = [str(find_program("rabbitmqctl")), "-q", *arguments]
        done = subprocess.run(
            command, env=self.environment, check=True, capture_output=True, text=True, cwd="/"
        )
        return done.stdout

    @property
    def pid(self) -> int:
        """The pid of the server itself."""
        children = psutil.Process(self.process.pid).children()
        (pid,) = [each.pid for each in children if each.name() == "beam.smp"]
        return pid


@contextlib.contextmanager
def rabbitmq(**settings: str) -> Iterator[RabbitMQ]:
    """Run a RabbitMQ server for the duration of the block, then delete it with its data.

    Raises `SystemExit` if it is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="rabbitmq-", ignore_cleanup_errors=True) as directory:
        server = RabbitMQ(Path(directory), **settings)
        server.start()
        try:
            yield server
        finally:
            server.stop()


def keep(parent: Parent, directory: Path, program: str) -> None:
    """Run the port mapper and the server until one ends, or SIGTERM. The parent's end is one.

    Without the parent the directory is deleted too.
    """
    signals: list[int] = []
    # No exception, which could interrupt the start of a program: nothing would end that one.
    signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    port = int(os.environ["ERL_EPMD_PORT"])
    # In the foreground, so that it ends with the server.
    command = [shutil.which("epmd") or "epmd", "-port", str(port)]
    try:
        with (
            (directory / "output").open("ab") as output,
            _running(command, subprocess.DEVNULL) as mapper,
        ):
            if not wait_until_listening(port, lambda: mapper.poll() is None and not signals):
                return
            with _running([program], output) as server:
                while server.poll() is None and not signals:
                    time.sleep(KEEP_SECONDS)
    finally:
        if not parent.is_running:
            shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _running(command: list[str], output: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a program during the block, then kill it and its children."""
    # In a session of its own, which Ctrl-C does not reach.
    process = subprocess.Popen(
        command,
        stdout=output,
        stderr=output,
        stdin=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _exit(_: int, __: FrameType | None) -> None:
    # Not twice, which would interrupt the clean-up.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(0)


def run() -> None:
    """Run a server until Ctrl-C, SIGTERM, SIGHUP, or the end of the parent; print its URL."""
    parent = Parent()
    for number in SIGNALS:
        signal.signal(number, _exit)
    with rabbitmq() as server:
        sys.stdout.write(f"AMQP_URL={server.url}\n")
        sys.stdout.flush()
        while parent.is_running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.wait(dev_child.CHECK_SECONDS)
                sys.exit("the temporary RabbitMQ has ended")


def main() -> None:
    """Run a server, or keep one for another process."""
    match sys.argv[1:]:
        case []:
            run()
        case ["keep", parent_pid, directory, program]:
            keep(Parent(int(parent_pid)), Path(directory), program)
        case _:
            sys.exit(f"{__doc__}\nusage: python -m scripts.dev_rabbitmq")


if __name__ == "__main__":
    main()
