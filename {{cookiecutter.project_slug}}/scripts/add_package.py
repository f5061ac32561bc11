"""Add a package to pyproject.toml and to the requirements: `make add P=package`, `G=dev` for tests.

Usage: `python -m scripts.add_package REQUIREMENT [GROUP]`. It runs `make lock`, which changes no
other package unless the new one requires it. If that fails, all files stay as they were.
"""

from __future__ import annotations

import re
import subprocess
import sys

from scripts.project_files import MAKE, PROJECT, restored

METADATA = PROJECT / "pyproject.toml"
LOCKED = PROJECT / "requirements-dev.txt"
#: PEP 508, without markers and addresses: name, extras, versions.
REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*)(\[[\w.,-]+\])?(?P<bounds>([=<>!~]=?[\w.,*]+)*)"
)
#: A line of a list of requirements.
LINE = re.compile(r'^    "([A-Za-z0-9][\w.-]*)')


def normalize(name: str) -> str:
    """Return the name as it is compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def insert(text: str, group: str, requirement: str) -> str:
    """Return pyproject.toml with a requirement in its place in a list, sorted by name."""
    opening = "dependencies = [" if group == "project" else f"{group} = ["
    lines = text.split("\n")
    if opening not in lines:
        sys.exit(f"G={group}: pyproject.toml has no such group of dependencies")
    number = lines.index(opening) + 1
    name = normalize(re.split(r"[\[=<>!~]", requirement)[0])
    while lines[number] != "]":
        found = LINE.match(lines[number])
        if found and normalize(found[1]) == name:
            sys.exit(f"P={requirement}: {found[1]} is in pyproject.toml already; edit it there")
        if found and normalize(found[1]) > name:
            break
        number += 1
    lines.insert(number, f'    "{requirement}",')
    return "\n".join(lines)


def bounds(version: str) -> str:
    """Return the range of compatible versions: the same major, or the same minor of 0."""
    major, minor, *_ = [*version.split("."), "0"]
    if major == "0":
        number = re.split(r"\D", minor)[0]  # of 0.59b0, which is the newest of some packages
        return f">=0.{minor},<0.{int(number) + 1}"
    return f">={major}.{minor},<{int(major) + 1}"


def locked_version(name: str) -> str:
    """Return the version of a package in the requirements."""
    found = re.search(rf"^{re.escape(normalize(name))}==([\w.]+)", LOCKED.read_text(), re.MULTILINE)
    if not found:
        sys.exit(f"{LOCKED.name}: {name} is missing after `make lock`")
    return found[1]


def add(requirement: str, group: str) -> str:
    """Add a requirement; return it with its bounds. Raises `SystemExit` if it cannot be locked."""
    parsed = REQUIREMENT.fullmatch(requirement)
    if not parsed:
        sys.exit(f"P={requirement}: must be a package, for example P=httpx or P='httpx>=0.28,<1'")
    METADATA.write_text(insert(METADATA.read_text(), group, requirement))
    subprocess.run([MAKE, "--silent", "lock"], cwd=PROJECT, check=True)
    if parsed["bounds"]:
        return requirement
    bounded = requirement + bounds(locked_version(parsed["name"]))
    METADATA.write_text(METADATA.read_text().replace(f'"{requirement}"', f'"{bounded}"', 1))
    return bounded


def main(requirement: str, group: str = "project") -> None:
    """Add a requirement, or restore all files."""
    files = [METADATA, *PROJECT.glob("requirements*.txt")]
    try:
        with restored(PROJECT, [file.name for file in files]):
            added = add(requirement, group)
    except subprocess.CalledProcessError:
        sys.exit(f"P={requirement}: cannot be locked, see above; nothing is changed")
    sys.stdout.write(f"added {added}\n")


if __name__ == "__main__":
    if not all(sys.argv[1:2]) or len(sys.argv) < 2:
        sys.exit("P is missing: make add P=package, with G=dev for tests and tools")
    main(*filter(None, sys.argv[1:]))
