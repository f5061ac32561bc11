"""A RabbitMQ of development: on the loopback interface alone, and nothing is left of it.

Erlang's manual of epmd: a node starts it as a daemon if none runs, and it outlives the node.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from scripts import dev_rabbitmq
from scripts.dev_services import is_listening
from tests.jobs.broker_server import require_rabbitmq
from tests.service_process import PROJECT, eventually

COMMAND = [sys.executable, "-m", "scripts.dev_rabbitmq"]
#: A parent, such as make, that a test can kill.
PARENT = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(600)"


class Command:
    """`python -m scripts.dev_rabbitmq`, ready, as a child of another process."""

    def __init__(self, temporary: Path) -> None:
        self.parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, *COMMAND],
            cwd=PROJECT,
            env=os.environ | {"TMPDIR": str(temporary)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.parent.stdout is not None
        self.url = self.parent.stdout.readline().strip()
        self.processes = psutil.Process(self.parent.pid).children(recursive=True)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2].strip("/"))


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    require_rabbitmq()
    command = Command(tmp_path)
    yield command
    command.parent.kill()
    for process in command.processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    command.parent.wait()
    assert command.parent.stdout is not None
    command.parent.stdout.close()


def listening(processes: list[psutil.Process]) -> set[str]:
    """Return the addresses at which processes listen."""
    addresses = set()
    for process in processes:
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                addresses.add(connection.laddr.ip)
    return addresses


def test_nothing_is_left_when_the_parent_is_killed(command: Command, tmp_path: Path) -> None:
    assert command.url.startswith("AMQP_URL=amqp://app:")
    assert is_listening(command.port)
    assert {process.name() for process in command.processes} >= {"beam.smp", "epmd"}
    assert listening(command.processes) <= {"127.0.0.1", "::1"}
    (directory,) = tmp_path.iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700

    command.parent.kill()
    eventually(lambda: not any(process.is_running() for process in command.processes))
    assert list(tmp_path.iterdir()) == []


def test_signal_during_the_start_leaves_nothing(tmp_path: Path) -> None:
    require_rabbitmq()
    process = subprocess.Popen(
        COMMAND, cwd=PROJECT, env=os.environ | {"TMPDIR": str(tmp_path)}, start_new_session=True
    )
    started = psutil.Process(process.pid)
    eventually(lambda: len(started.children(recursive=True)) >= 3)
    children = started.children(recursive=True)
    # As a terminal does it: the whole group gets Ctrl-C.
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 0
    _, alive = psutil.wait_procs(children, 10)
    assert alive == []
    assert list(tmp_path.iterdir()) == []


def test_missing_program_is_one_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dev_rabbitmq, "find_program", lambda: None)
    with pytest.raises(SystemExit, match="apt-get install rabbitmq-server"):
        dev_rabbitmq.RabbitMQ(tmp_path)


def test_server_that_cannot_start_is_reported_with_its_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "rabbitmq-server"
    program.write_text("#!/bin/sh\necho no Erlang here\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(dev_rabbitmq, "find_program", lambda: str(program))
    with pytest.raises(SystemExit, match=r"does not listen on port \d+:\nno Erlang here"):
        dev_rabbitmq.RabbitMQ(tmp_path).start()
