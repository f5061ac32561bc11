"""The benchmark runs, reports errors in one line, and the README shows its figures."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import psutil
import pytest

from benchmarks import BenchError, consumer, load, report, testbed
from benchmarks.servers import Server
from scripts.ports import eventually, free_port
from tests.conftest import ROOT, missing
from tests.test_readme import READY_SECONDS, terminal

RESULTS = ROOT / "benchmarks"
TOOLS = os.environ.get("TOOLS", ROOT / ".tools")
QUICK = ["make", "bench", "QUICK=1", f"VENV={sys.prefix}", f"TOOLS={TOOLS}"]
NO_WRK = "wrk is missing; install it: apt-get install wrk, or brew install wrk"
#: A server that responds 200 to its first request; then it runs `then` and responds 500.
SERVER = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    served = 0
    def do_GET(self):
        if Handler.served:
            {then}
        self.send_response(500 if Handler.served else 200)
        self.send_header("Content-Length", "0")
        self.send_header("Connection", "close")
        self.end_headers()
        Handler.served += 1
    def log_message(self, *_): pass
print("the last line", flush=True)
http.server.HTTPServer(("127.0.0.1", {port}), Handler).serve_forever()
"""


def server(then: str) -> Server:
    port = free_port()
    command = [sys.executable, "-c", SERVER.format(then=then, port=port)]
    return Server("a server", command, Path("/"), port, "/")


def require_wrk() -> None:
    """Require the tools of a whole run, valgrind among them."""
    for tool in ("wrk", "valgrind"):
        if not shutil.which(tool):
            missing(tool)


def test_readme_and_results_show_the_figures_of_one_run() -> None:
    figures = json.loads((RESULTS / "results.json").read_text())
    assert figures["machine"]["command"] == "make bench"
    assert (RESULTS / "results.md").read_text() == report.document(figures)
    found = report.BLOCK.search((ROOT / "README.md").read_text())
    assert found
    assert found.group() == report.block(figures)


def test_results_show_the_consumer_and_the_cpu_of_an_idle_worker() -> None:
    figures = json.loads((RESULTS / "results.json").read_text())
    figures["consumer"] = {
        "at_once": {"per_second": [900.0], "cpu_us": [800.0]},
        "slow": {"per_second": [144.0], "cpu_us": [1000.0]},
    }
    for name, milliseconds in {"bare": 2.5, "service": 1.2}.items():
        figures["idle"][name]["cpu_ms"] = milliseconds
    text = report.document(figures)
    rows = [line.split(" | ")[:3] for line in text.splitlines() if line.startswith("| ")]
    assert ["| consumer: events per second of CPU", report.NOTHING, "1,250"] in rows
    assert ["| consumer: share of concurrency / latency", report.NOTHING, "90 %"] in rows
    assert ["| idle worker, CPU per second", "2.5 ms", "1.2 ms"] in rows


def test_missing_wrk_is_reported_in_one_line(tmp_path: Path) -> None:
    """The line names the package to install."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks"],
        cwd=ROOT,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"benchmark failed: {NO_WRK}\n"


def test_error_responses_fail_the_measurement() -> None:
    require_wrk()
    expected = pytest.raises(BenchError, match=r"a server at /: errors .* status")
    with server("pass") as failing, expected:
        load.measure(failing, 1)


def test_a_server_that_exits_is_reported_with_its_last_line() -> None:
    require_wrk()
    expected = pytest.raises(BenchError, match=r"exited with code 3: the last line")
    with server("os._exit(3)") as exiting, expected:
        load.measure(exiting, 1)


def test_requests_that_were_given_up_do_not_count_as_served() -> None:
    with server("pass") as failing, pytest.raises(BenchError, match="returned 500 under load"):
        load.ramp_step(failing, rate=50, settle=0, seconds=0.2, patience=1)
    with server("import time; time.sleep(5)") as stuck:
        seen = load.ramp_step(stuck, rate=50, settle=0, seconds=0.2, patience=0.3)
    assert (seen.answered, seen.shed, seen.given_up, seen.p99_ms) == (0, 0, 50, None)
    assert seen.p99_of_all_ms >= 300


#: A module that measures: it stops its servers slowly when it is interrupted.
FIGURES = """
import time
from pathlib import Path
try:
    Path("started").touch()
    time.sleep(60)
finally:
    time.sleep(0.5)
    Path("stopped").touch()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="make bench is for Linux and macOS")
def test_an_interrupted_run_waits_for_its_module_to_stop_its_servers(tmp_path: Path) -> None:
    apps = tmp_path / "apps"
    apps.mkdir()
    (apps / "figures.py").write_text(FIGURES)
    unused = urlsplit("")
    own = testbed.Testbed(tmp_path, tmp_path, Path(sys.executable), unused, unused)

    def interrupt_started() -> None:
        eventually(lambda: (tmp_path / "started").exists(), READY_SECONDS)
        os.kill(os.getpid(), signal.SIGUSR1)

    def handler(*_: object) -> NoReturn:
        raise BenchError("interrupted")

    before = signal.signal(signal.SIGUSR1, handler)
    thread = threading.Thread(target=interrupt_started)
    try:
        thread.start()
        with pytest.raises(BenchError, match="interrupted"):
            own.run_figures("figures")
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, before)
    assert (tmp_path / "stopped").exists()


@pytest.mark.slow
def test_a_quick_run_measures_everything_and_overwrites_nothing() -> None:
    require_wrk()
    before = {path: path.read_bytes() for path in (ROOT / "README.md", *RESULTS.glob("results.*"))}
    done = subprocess.run(QUICK, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (name,) = re.findall(r"results are in (\S+)", done.stdout)
    directory = ROOT / name
    try:
        figures = json.loads((directory / "results.json").read_text())
        assert report.document(figures) == (directory / "results.md").read_text()
        for part in ("small", "post", "instructions", "ramp"):
            assert set(figures[part]) == {"bare", "service"}
        assert set(figures["query"]) == {"bare", "service", "plain"}
        assert set(figures["traces"]) == {"without", "off", "10", "100"}
        assert 0 < consumer.share(figures["consumer"]) <= 1
        assert consumer.per_cpu_second(figures["consumer"]) > 0
        assert set(figures["idle"]["service"]) >= {"cpu_ms", "memory_1", "memory_2"}
        assert {"results.svg", "results.png"} <= {path.name for path in directory.iterdir()}
    finally:
        shutil.rmtree(directory)
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.slow
def test_ctrl_c_stops_a_run_with_one_line_and_leaves_nothing() -> None:
    require_wrk()
    with terminal(QUICK) as running:
        eventually(lambda: "small JSON" in running.read(), READY_SECONDS)
        family = running.family()
        directories = running.directories(family)
        assert directories  # its Postgres at least
        assert len(family) > 5  # make, the run, Postgres, Redis, servers
        running.interrupt()
        _, alive = psutil.wait_procs(family, 10)
        assert alive == []
        assert not any(path.exists() for path in [*directories, *running.directories(family)])
        assert running.process.returncode != 0
        assert "benchmark failed: interrupted by SIGINT" in running.read()
        assert "Traceback" not in running.text
