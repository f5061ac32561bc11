"""Remove the example for good: its folders and files, the lines and blocks that are marked, and this script."""

import re
import sys
from pathlib import Path

PATHS = [
    *("deploy/k8s/components/consumer", "deploy/k8s/components/gateway-egress"),
    *("app/patterns", "app/payments", "tests/patterns", "tests/payments"),
    *("migrations/versions/0001_payments.py", "migrations/versions/0002_patterns.py"),
    *("scripts/tail_events.py", "scripts/fake_gateway.py", "scripts/remove_example.py"),
]
TEXTS = {".py", ".toml", ".md", ".yaml", ".yml", ".example", ""}
LINE = re.compile(r"^.*# example\n", re.MULTILINE)
ROW = re.compile(r"^.*<!-- example --> \|\n", re.MULTILINE)  # of a table in Markdown
#: A block, with one of the two blank lines that it would leave behind.
BLOCK = re.compile(
    r"^[^\n]*example: begin(?:(?!example: end).)*example: end[^\n]*\n", re.MULTILINE | re.DOTALL
)
BETWEEN_BLANKS = re.compile(r"(?<=\n\n)" + BLOCK.pattern + r"\n", re.MULTILINE | re.DOTALL)
#: In a migration of the project's own that followed those of the example.
FOLLOWS = re.compile(r'^down_revision = "(0001_payments|0002_patterns)"$', re.MULTILINE)
#: Folders that are not the project's own text.
SKIPPED = {".git", ".venv", ".tools", "__pycache__", "node_modules"}


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for child in path.iterdir():
            _delete(child)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def _texts(folder: Path) -> list[Path]:
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or path.name in SKIPPED:
            continue
        if path.is_dir():
            found += _texts(path)
        elif path.suffix in TEXTS:
            found.append(path)
    return found


def remove(project: Path) -> None:
    """Remove the example from the project in this folder. A second run changes nothing."""
    for name in PATHS:
        _delete(project / name)
    for path in _texts(project):
        before = path.read_bytes().decode(errors="surrogateescape")
        after = (ROW if path.suffix == ".md" else LINE).sub(
            "", BLOCK.sub("", BETWEEN_BLANKS.sub("", before))
        )
        if path.parent.name == "versions":
            after = FOLLOWS.sub("down_revision = None", after)
        if after != before:
            path.write_bytes(after.encode(errors="surrogateescape"))
    answers = (
        project / ".cruft.json"
    )  # so that an update of the template leaves the example out as well
    if answers.exists():
        answers.write_text(
            answers.read_text().replace('"include_example": true', '"include_example": false')
        )


if __name__ == "__main__":
    remove(Path(__file__).resolve().parent.parent)
    sys.stdout.write(
        "The example is gone: look at `git status`. A database that was migrated with it still has it.\n"
    )
