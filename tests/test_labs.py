"""The workshop: each lab has a page, and runs as the page describes it."""

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import psutil
import pytest

from tests.conftest import ROOT, SERVICE_BIN, SOURCE

SERVICE = ROOT / SOURCE
PAGES = SERVICE / "docs/workshop"
MAX_LINES = 60
LIMIT_SECONDS = 120
#: Memory of all processes of a lab. 17 workers need more: that is what lab 4 shows.
LIMIT_MB = 300
MORE_MB = {"workers": 550}
SAMPLE_SECONDS = 0.5


def find_labs() -> Iterator[tuple[int, str]]:
    """Yield the number and the name of each lab."""
    for path in sorted((SERVICE / "labs").glob("*.py")):
        if number := re.search(r"^NUMBER = (\d)$", path.read_text(), re.MULTILINE):
            yield int(number[1]), path.stem


LABS = sorted(find_labs())


@pytest.mark.parametrize(("number", "name"), LABS)
def test_page_has_its_parts(number: int, name: str) -> None:
    """In the order in which a student needs them."""
    text = (PAGES / f"{number}-{name.replace('_', '-')}.md").read_text()
    assert len(text.splitlines()) <= MAX_LINES
    parts = ["# Lab", "## Guess first", f"make lab L={name}", f"({name}.svg)"]
    parts += ["## Why it happened", "## What the template does", "## Try to break it"]
    places = [text.find(part) for part in parts]
    assert -1 not in places, dict(zip(parts, places, strict=True))
    assert places == sorted(places)


def test_every_lab_is_on_the_page_of_the_teacher_and_no_other() -> None:
    text = (PAGES / "README.md").read_text()
    linked = sorted(re.findall(r"\((\d)-([\w-]+)\.md\)", text))
    assert linked == [(str(number), name.replace("_", "-")) for number, name in LABS]


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda path: path.stem)
def test_links_of_pages_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for _, name in LABS])
def test_lab_holds_its_claim_and_its_control_fails(name: str, tmp_path: Path) -> None:
    """With Postgres alone. The memory is what the page of the teacher says."""
    printed, peak_mb = run_lab(name, tmp_path, RABBITMQ="0")
    assert "claim held: " in printed
    assert "control failed as it must: " in printed
    ElementTree.parse(tmp_path / f"{name}.svg")
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / f"{name}.txt").exists()
    assert peak_mb < MORE_MB.get(name, LIMIT_MB)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("rabbitmq-server"), reason="needs rabbitmq-server")
def test_prefetch_is_no_concurrency_with_rabbitmq_either(tmp_path: Path) -> None:
    printed, _ = run_lab("prefetch", tmp_path)
    assert "RabbitMQ hands out the messages." in printed
    assert "control failed as it must: " in printed


def run_lab(name: str, results: Path, **variables: str) -> tuple[str, float]:
    """Return the output of a lab that succeeds, and the most memory of its processes, in MB."""
    with tempfile.TemporaryDirectory(prefix="lab-", dir="/tmp") as directory:
        # As root, Postgres is another user.
        Path(directory).chmod(0o755)
        own = {"LABS_DIRECTORY": str(results), "TMPDIR": directory, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [SERVICE_BIN / "python", "-m", "labs", name],
            cwd=SERVICE,
            env=os.environ | own | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with ThreadPoolExecutor() as threads:
            peak = threads.submit(peak_memory, process, directory)
            printed, _ = process.communicate(timeout=LIMIT_SECONDS)
            assert process.returncode == 0, printed
            return printed, peak.result() / 1e6


def peak_memory(process: subprocess.Popen[str], directory: str) -> int:
    """Return the most bytes that a lab and all its processes use, until it ends.

    The proportional set size: memory that processes share counts once. Postgres is no child of the
    lab, but it has the directory of temporary files in its command line.
    """
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(memory, find_processes(process.pid, directory))))
        time.sleep(SAMPLE_SECONDS)
    return peak


def find_processes(pid: int, directory: str) -> set[psutil.Process]:
    """Return the process, those with the directory in their command line, and all children."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid == pid or any(directory in word for word in process.cmdline()):
                found |= {process, *process.children(recursive=True)}
    return found


def memory(process: psutil.Process) -> int:
    """Return the proportional set size of a process in bytes, 0 where the system has none."""
    with contextlib.suppress(psutil.Error):
        return getattr(process.memory_full_info(), "pss", 0)
    return 0
