"""Make a release: check, move the changelog's unreleased lines under the version, commit, tag.

It pushes nothing. `make release V=1.2.0` runs it; CONTRIBUTING.md has the steps around it.
"""

import datetime
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNRELEASED = "## Unreleased\n"
VERSION = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")


def run_git(root: Path, *command: str) -> str:
    """Run git in a repository and return its output."""
    done = subprocess.run(["git", *command], cwd=root, check=True, stdout=subprocess.PIPE)
    return done.stdout.decode().strip()


def parse(version: str) -> tuple[int, ...]:
    """Return the numbers of a version. Raises `ValueError`."""
    if not VERSION.fullmatch(version):
        msg = f"V={version}: must be three numbers, for example V=1.2.0"
        raise ValueError(msg)
    return tuple(map(int, version.split(".")))


def released_versions(root: Path) -> list[str]:
    """Return the versions that have a tag, oldest first."""
    names = run_git(root, "tag", "--list", "v*").split()
    versions = [name[1:] for name in names if VERSION.fullmatch(name[1:])]
    return sorted(versions, key=parse)


def notes(changelog: str, heading: str) -> str:
    """Return the lines of a section of the changelog, without its heading."""
    section = re.search(
        rf"^{re.escape(heading)}\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL
    )
    return section[1].strip() if section else ""


def check(root: Path, version: str) -> None:
    """Raise `ValueError` with the remedy if this version cannot be released."""
    number = parse(version)
    released = released_versions(root)
    if released and number <= parse(released[-1]):
        msg = f"V={version}: must be greater than {released[-1]}, the newest release"
        raise ValueError(msg)
    if run_git(root, "status", "--porcelain"):
        msg = "the work tree has changes; commit them first"
        raise ValueError(msg)
    if run_git(root, "rev-parse", "--abbrev-ref", "HEAD") != "main":
        msg = "releases are made from main; run `git switch main` first"
        raise ValueError(msg)
    if not notes((root / "CHANGELOG.md").read_text(encoding="utf-8"), UNRELEASED.strip()):
        msg = "CHANGELOG.md has no unreleased lines; list what changes in generated projects"
        raise ValueError(msg)


def release(root: Path, version: str, day: datetime.date) -> None:
    """Commit the changelog of this version, and tag the commit with its lines."""
    path = root / "CHANGELOG.md"
    heading = f"## v{version} ({day.isoformat()})"
    text = path.read_text(encoding="utf-8").replace(UNRELEASED, f"{UNRELEASED}\n{heading}\n", 1)
    path.write_text(text, encoding="utf-8", newline="\n")
    run_git(root, "commit", "--quiet", "--message", f"Release v{version}", "CHANGELOG.md")
    message = f"v{version}\n\n{notes(text, heading)}\n"
    run_git(root, "tag", "--annotate", f"v{version}", "--cleanup=verbatim", "--message", message)


def main(arguments: list[str]) -> None:
    """Release the version that is the only argument."""
    version = "".join(arguments)
    try:
        check(ROOT, version)
    except ValueError as error:
        sys.exit(f"not released: {error}")
    release(ROOT, version, datetime.datetime.now(datetime.UTC).date())
    sys.stdout.write(f"v{version} is tagged. Next: git push origin main v{version}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
