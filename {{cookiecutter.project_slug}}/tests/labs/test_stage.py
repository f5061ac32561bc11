"""Everything that a lab starts ends with it: at its end, at Ctrl-C, and at its limit of time."""

import os
import signal
import sys
import threading
import time

import httpx
import psutil
import pytest

from labs.stage import (
    LabError,
    Process,
    Stage,
    clean_environment,
    has_ended,
    open_stage,
    wait_until,
)

SLEEP = (sys.executable, "-c", "import time; time.sleep(60)")
#: A child that the stage has not started itself.
WITH_CHILD = (
    sys.executable,
    "-c",
    f"import subprocess; subprocess.run([{sys.executable!r}, '-c', 'import time; time.sleep(60)'])",
)


def say(_: str) -> None:
    """Print nothing."""


def test_processes_end_with_the_lab() -> None:
    with open_stage(say) as stage:
        process = stage.start(*WITH_CHILD, variables=os.environ)
        wait_until(lambda: len(process.family()) == 2, "it has a child")
        child = process.family()[1]
        directory = stage.directory
    assert not process.is_running
    assert has_ended(child)
    assert not directory.exists()


def sleep(stage: Stage, started: list[Process]) -> None:
    started.append(stage.start(*SLEEP, variables=os.environ))
    time.sleep(30)


def test_limit_of_time_ends_the_lab() -> None:
    started: list[Process] = []
    with pytest.raises(LabError, match=r"not done within 0\.3 s"), open_stage(say, 0.3) as stage:
        sleep(stage, started)
    assert not started[0].is_running


def test_sigterm_ends_the_lab() -> None:
    """make and editors send it."""
    started: list[Process] = []
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(KeyboardInterrupt), open_stage(say) as stage:
        sleep(stage, started)
    assert not started[0].is_running


def test_signals_are_as_before_after_the_lab() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGTERM)]
    with open_stage(say):
        pass
    after = [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGTERM)]
    assert after == before


def test_failed_process_is_an_error_with_its_last_line() -> None:
    with open_stage(say) as stage:
        program = "raise SystemExit('no luck')"
        variables = clean_environment()
        process = stage.start(sys.executable, "-c", program, variables=variables)
        process.wait()
        with pytest.raises(LabError, match="exited with 1: no luck"):
            process.check()


def test_settings_of_the_developer_do_not_reach_the_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAIN_SECONDS", "99")
    monkeypatch.setenv("GUNICORN_CMD_ARGS", "--workers 9")
    monkeypatch.setenv("LANG", "C")
    environment = clean_environment()
    assert "DRAIN_SECONDS" not in environment
    assert "GUNICORN_CMD_ARGS" not in environment
    assert environment["LANG"] == "C"


def test_live_view_shows_the_next_process_and_ends_with_the_lab(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WATCH", "1")
    printed: list[str] = []

    def is_printed() -> bool:
        printed.append(capfd.readouterr().out)
        return "watch " in "".join(printed) and printed[-1].endswith("\n")

    with open_stage(say) as stage:
        ports = stage.watch()
        wait_until(is_printed, "the address is printed")
        _, url, _, service = "".join(printed).split()[-4:]
        assert url.startswith("http://127.0.0.1:")
        assert service == f"http://127.0.0.1:{ports.service}"
        assert httpx.get(url).status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_without_watch_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker has its probes and its metrics on one port."""
    monkeypatch.delenv("WATCH", raising=False)
    with open_stage(say) as stage:
        before = len(psutil.Process().children())
        ports = stage.watch(is_worker=True)
        assert ports.service == ports.metrics
        assert len(psutil.Process().children()) == before
