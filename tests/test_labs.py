"""The workshop: each lab has a page, and runs as the page describes it."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.conftest import ROOT, SERVICE_BIN, SOURCE

SERVICE = ROOT / SOURCE
PAGES = SERVICE / "docs/workshop"
MAX_LINES = 60
LIMIT_SECONDS = 120


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
    environment = os.environ | {"LABS_DIRECTORY": str(tmp_path)}
    done = subprocess.run(
        [SERVICE_BIN / "python", "-m", "labs", name],
        cwd=SERVICE,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "claim held: " in done.stdout
    assert "control failed as it must: " in done.stdout
    ElementTree.parse(tmp_path / f"{name}.svg")
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / f"{name}.txt").exists()
