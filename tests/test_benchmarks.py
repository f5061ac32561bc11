"""The benchmark runs, says what is wrong in one line, and its figures are those that the README shows."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks import BenchError, load, report
from benchmarks.servers import Server
from benchmarks.site import free_port
from tests.conftest import ROOT, missing
from tests.containers import eventually
from tests.test_readme import READY_SECONDS, terminal

RESULTS = ROOT / "benchmarks"
QUICK = [
    "make",
    "bench",
    "QUICK=1",
    f"VENV={sys.prefix}",
    f"TOOLS={os.environ.get('TOOLS', ROOT / '.tools')}",
]
#: A server that answers its first request, and then does what it is told to.
SERVER = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    answered = 0
    def do_GET(self):
        if Handler.answered:
            {then}
        self.send_response(500 if Handler.answered else 200)
        self.send_header("Content-Length", "0")
        self.send_header("Connection", "close")
        self.end_headers()
        Handler.answered += 1
    def log_message(self, *_): pass
print("the last words", flush=True)
http.server.HTTPServer(("127.0.0.1", {port}), Handler).serve_forever()
"""


def server(then: str) -> Server:
    port = free_port()
    command = [sys.executable, "-c", SERVER.format(then=then, port=port)]
    return Server("a server", command, Path("/"), port, "/")


def needs_wrk() -> None:
    if not shutil.which("wrk"):
        missing("wrk")


def test_readme_and_results_show_the_figures_of_one_run() -> None:
    figures = json.loads((RESULTS / "results.json").read_text())
    assert figures["machine"]["command"] == "make bench"
    assert (RESULTS / "results.md").read_text() == report.document(figures)
    found = report.BLOCK.search((ROOT / "README.md").read_text())
    assert found
    assert found.group() == report.block(figures)


def test_a_missing_wrk_is_one_line_that_names_its_package(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks"]
    done = subprocess.run(
        command, cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == "benchmark failed: wrk is missing; install it: apt-get install wrk, or brew install wrk\n"
    )


def test_the_figure_of_a_server_that_fails_is_none() -> None:
    needs_wrk()
    with (
        server("pass") as failing,
        pytest.raises(BenchError, match=r"a server at /: errors .* status"),
    ):
        load.measure(failing, 1)


def test_a_server_that_ends_is_named_with_its_last_words() -> None:
    needs_wrk()
    with (
        server("os._exit(3)") as ending,
        pytest.raises(BenchError, match=r"ended with exit code 3: the last words"),
    ):
        load.measure(ending, 1)


def test_clients_that_give_up_are_not_counted_as_answered() -> None:
    with server("pass") as failing, pytest.raises(BenchError, match="answered 500 under load"):
        load.ramp_step(failing, rate=50, settle=0, seconds=0.2, patience=1)
    with server("import time; time.sleep(5)") as stuck:
        seen = load.ramp_step(stuck, rate=50, settle=0, seconds=0.2, patience=0.3)
    assert (seen.answered, seen.shed, seen.given_up, seen.p99_ms) == (0, 0, 50, None)
    assert seen.p99_of_all_ms >= 300


@pytest.mark.slow
def test_a_quick_run_measures_everything_and_overwrites_nothing() -> None:
    needs_wrk()
    before = {path: path.read_bytes() for path in (ROOT / "README.md", *RESULTS.glob("results.*"))}
    done = subprocess.run(QUICK, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (name,) = re.findall(r"results are in (\S+)", done.stdout)
    folder = ROOT / name
    try:
        figures = json.loads((folder / "results.json").read_text())
        assert report.document(figures) == (folder / "results.md").read_text()
        assert (
            {"bare", "service"}
            == set(figures["small"])
            == set(figures["query"])
            == set(figures["ramp"])
        )
        assert {"results.svg", "results.png"} <= {path.name for path in folder.iterdir()}
    finally:
        shutil.rmtree(folder)
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.slow
def test_ctrl_c_ends_a_run_in_one_line_and_leaves_nothing() -> None:
    needs_wrk()
    with terminal(QUICK) as running:
        eventually(lambda: "small JSON" in running.read(), READY_SECONDS)
        family = running.family()
        folders = running.folders(family)
        assert folders  # its Postgres at least
        assert len(family) > 5  # make, the run, Postgres, Redis, servers
        running.interrupt()
        _, alive = psutil.wait_procs(family, 10)
        assert alive == []
        assert not any(path.exists() for path in [*folders, *running.folders(family)])
        assert running.process.returncode != 0
        assert "benchmark failed: interrupted by SIGINT" in running.read()
        assert "Traceback" not in running.text
