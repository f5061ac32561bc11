"""Tools of one line: `make logs` and `make add`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service_process import PROJECT

LINE = {
    "timestamp": "2026-01-31T12:30:15.123Z",
    "level": "error",
    "logger": "app.observe",
    "message": "unhandled exception",
    "service": "orders",
    "pid": 7,
    "request_id": "r1",
    "exception": {"type": "E", "message": "m", "traceback": "Traceback\n  line\n"},
}
PRETTY = b"""12:30:15.123 ERROR    app.observe: unhandled exception request_id=r1
Traceback
  line
"""
#: In place of `make lock`: it locks the packages in the environment variable.
MAKE = '#!/bin/sh\nprintf "%s\\n" $LOCKED >> requirements-dev.txt; exit $STATUS\n'


def pretty(lines: bytes) -> bytes:
    command = [sys.executable, str(PROJECT / "scripts/pretty_logs.py")]
    return subprocess.run(command, input=lines, capture_output=True, check=True).stdout


def test_log_lines_are_printed_for_people() -> None:
    assert pretty(json.dumps(LINE).encode() + b"\n") == PRETTY


@pytest.mark.parametrize(
    "line",
    [b"no json", b"[1, 2]", b'{"a": 1}', b'"text"', b"", b"[" * 100_000, b"  indented", b"null"],
)
def test_other_lines_are_printed_as_they_are(line: bytes) -> None:
    assert pretty(line + b"\n") == line + b"\n"


def test_bytes_and_types_that_no_log_line_has_do_not_stop_it() -> None:
    odd = b'{"message": 1, "timestamp": null, "level": [], "exception": "text"}\n'
    shown = "\ufffd\ufffd\n []       : 1\ntext\nend\n"
    assert pretty(b"\xff\xfe\n" + odd + b"end") == shown.encode()


def test_reader_that_ends_stops_it_without_a_traceback() -> None:
    command = 'yes "$1" | "$2" scripts/pretty_logs.py | head -n 1'
    arguments = ["sh", "-c", command, "sh", json.dumps(LINE), sys.executable]
    done = subprocess.run(arguments, cwd=PROJECT, capture_output=True, check=True, timeout=30)
    assert done.stdout == PRETTY.splitlines(keepends=True)[0]
    assert b"Traceback" not in done.stderr


def add(
    project: Path, *arguments: str, locked: str = "", status: int = 0
) -> "subprocess.CompletedProcess[str]":
    """Run the script in a copy of the files that it edits."""
    (project / "scripts").mkdir(exist_ok=True)
    scripts = [f"scripts/{name}.py" for name in ("__init__", "add_package", "project_files")]
    for name in ("pyproject.toml", "requirements-dev.txt", *scripts):
        if not (project / name).exists():
            shutil.copy(PROJECT / name, project / name)
    make = project / "make"
    make.write_text(MAKE)
    make.chmod(0o755)
    return subprocess.run(
        [sys.executable, "-m", "scripts.add_package", *arguments],
        cwd=project,
        env=os.environ | {"MAKE": str(make), "LOCKED": locked, "STATUS": str(status)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("requirement", "group", "locked", "line"),
    [
        ("humanize", "", "humanize==4.17.0", '    "humanize>=4.17,<5",'),
        ("Zope.Event", "dev", "zope-event==0.7", '    "Zope.Event>=0.7,<0.8",'),
        ("humanize", "", "humanize==0.59b0", '    "humanize>=0.59b0,<0.60",'),
        ("boltons[all]", "", "boltons==25", '    "boltons[all]>=25.0,<26",'),
        ("humanize>=4,<6", "", "humanize==4.17.0", '    "humanize>=4,<6",'),
    ],
)
def test_package_is_added_in_its_place_with_bounds(
    tmp_path: Path, requirement: str, group: str, locked: str, line: str
) -> None:
    done = add(tmp_path, requirement, group, locked=locked)
    assert done.returncode == 0, done.stderr
    before = (PROJECT / "pyproject.toml").read_text().split("\n")
    after = (tmp_path / "pyproject.toml").read_text().split("\n")
    assert [each for each in after if each not in before] == [line]
    number = after.index(line)
    assert after[number - 1].lower() < line.lower()
    assert line.lower() < after[number + 1].lower() or after[number + 1] == "]"


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        ([], 0, "P is missing: "),
        ([""], 0, "P is missing: "),
        (["a;b"], 0, "P=a;b: must be a package"),
        (["FastAPI"], 0, "P=FastAPI: fastapi is in pyproject.toml already"),
        (["humanize", "none"], 0, "G=none: pyproject.toml has no such group"),
        (["humanize"], 2, "P=humanize: cannot be locked, see above; nothing is changed"),
        (["humanize"], 0, "requirements-dev.txt: humanize is missing"),
    ],
)
def test_package_that_cannot_be_added_changes_nothing(
    tmp_path: Path, arguments: list[str], status: int, line: str
) -> None:
    done = add(tmp_path, *arguments, status=status)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(line)
    assert "Traceback" not in done.stderr
    for name in ("pyproject.toml", "requirements-dev.txt"):
        assert (tmp_path / name).read_bytes() == (PROJECT / name).read_bytes()
