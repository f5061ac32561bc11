"""Remove the payments example: its files, all marked lines, and this script."""

import re
import sys
from pathlib import Path

PATHS = [
    "app/patterns",
    "app/payments",
    "deploy/k8s/components/consumer",
    "deploy/k8s/components/gateway-egress",
    "migrations/versions/0001_payments.py",
    "migrations/versions/0002_patterns.py",
    "scripts/dev_consumer.py",
    "scripts/fake_gateway.py",
    "scripts/quiet_http.py",
    "scripts/remove_example.py",
    "scripts/tail_events.py",
    "tests/patterns",
    "tests/payments",
]
#: Suffixes of the files that may contain marked lines.
SUFFIXES = {".py", ".toml", ".md", ".yaml", ".yml", ".example", ""}
#: Directories that do not belong to the project's own source.
SKIPPED = {".git", ".venv", ".tools", "__pycache__", "node_modules"}

MARKED_LINE = re.compile(r"^.*# example\n", re.MULTILINE)
#: A marked row of a table in Markdown.
MARKED_ROW = re.compile(r"^.*<!-- example --> \|\n", re.MULTILINE)
BLOCK = re.compile(
    r"^[^\n]*example: begin(?:(?!example: end).)*example: end[^\n]*\n", re.MULTILINE | re.DOTALL
)
#: A block between two blank lines, with the second of them: one must stay.
BLOCK_BETWEEN_BLANK_LINES = re.compile(
    r"(?<=\n\n)" + BLOCK.pattern + r"\n", re.MULTILINE | re.DOTALL
)
#: In a migration of the project's own that follows one of the example's.
FOLLOWS_EXAMPLE = re.compile(r'^down_revision = "(0001_payments|0002_patterns)"$', re.MULTILINE)


def remove(project: Path) -> None:
    """Remove the example from this project. A second run changes nothing."""
    for name in PATHS:
        _delete(project / name)
    for path in _text_files(project):
        _edit(path)
    _set_cruft_answer(project / ".cruft.json")


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for child in path.iterdir():
            _delete(child)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def _text_files(directory: Path) -> list[Path]:
    found = []
    for path in sorted(directory.iterdir()):
        if path.is_symlink() or path.name in SKIPPED:
            continue
        if path.is_dir():
            found += _text_files(path)
        elif path.suffix in SUFFIXES:
            found.append(path)
    return found


def _edit(path: Path) -> None:
    """Remove the marked parts of a file; leave all other bytes unchanged."""
    before = path.read_bytes().decode(errors="surrogateescape")
    text = BLOCK_BETWEEN_BLANK_LINES.sub("", before)
    text = BLOCK.sub("", text)
    marked = MARKED_ROW if path.suffix == ".md" else MARKED_LINE
    text = marked.sub("", text)
    if path.parent.name == "versions":
        text = FOLLOWS_EXAMPLE.sub("down_revision = None", text)
    if text != before:
        path.write_bytes(text.encode(errors="surrogateescape"))


def _set_cruft_answer(path: Path) -> None:
    """Let updates of the template leave the example out as well."""
    if path.exists():
        text = path.read_text()
        text = text.replace('"include_example": true', '"include_example": false')
        path.write_text(text)


if __name__ == "__main__":
    remove(Path(__file__).resolve().parent.parent)
    sys.stdout.write(
        "The example is removed: see `git status`. Databases that were migrated with it keep it.\n"
    )
