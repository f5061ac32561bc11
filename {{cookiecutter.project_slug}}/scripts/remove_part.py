"""Remove a part of the service for good: its files and marked lines, and in the end this script.

`scripts/parts` has a table for each part that the project still has. Only files that are listed
there are deleted or edited, and of their marked lines only the listed ones. What two parts list
goes with the last of them; a file that needs both goes with the first. A migration that follows one
of a removed part is re-parented.
"""

from __future__ import annotations

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

SCRIPT = "scripts/remove_part.py"
PARTS = "scripts/parts"
VERSIONS = "migrations/versions/"
#: The directory that keeps the files that move, each under its own path.
KEPT = "docs/patterns"
#: The marks of several owners are `# example or jobs`.
OWNERS = r"\w+(?: or \w+)*"
BEGIN = rf"^[ ]*(?:#|<!--) ({OWNERS}): begin(?: -->)?\n"
#: A marked row of a table in Markdown.
ROW = re.compile(rf"^.*<!-- ({OWNERS}) --> \|\n", re.MULTILINE)
DOWN_REVISION = re.compile(
    r"""^(down_revision\b[^=\n]*= )("[^"\n]*"|'[^'\n]*'|[(\[][^()\[\]]*[)\]])""", re.MULTILINE
)
#: Statements for a database that has been migrated with a part.
DROP_TABLES = "drop table if exists {tables};\n"
#: Unless it has a migration that stays as well, such as one of the team's.
GO_BACK = """\
update alembic_version set version_num = '{followed}'
where version_num in ({revisions}) and (select count(*) from alembic_version) = 1;
"""
FORGET = "delete from alembic_version\nwhere version_num in ({revisions});\n"
MAX_SHOWN = 5


class Part(NamedTuple):
    """The table of a part: the constants of a file in `scripts/parts`."""

    name: str
    #: Its name in messages.
    title: str
    #: The parts that need this one, and are removed with it.
    along: Sequence[str]
    #: The directories that have no files but these.
    directories: Sequence[str]
    paths: Sequence[str]
    #: The files of other parts that need this one as well, and are removed with it.
    dependents: Sequence[str]
    #: The beginnings of the paths that move to `KEPT`.
    moved: tuple[str, ...]
    #: The tables that its migrations create.
    tables: Sequence[str]
    #: Files with blocks or with marked rows of tables.
    files_with_blocks: Sequence[str]
    #: The marked lines of code of each file.
    lines: Mapping[str, Sequence[str]]


def parts(project: Path) -> dict[str, Part]:
    """Return the parts that the project still has."""
    found = {}
    for path in sorted((project / PARTS).glob("*.py")):
        constants = runpy.run_path(str(path))
        values = [constants[field.upper()] for field in Part._fields[1:]]
        found[path.stem] = Part(path.stem, *values)
    return found


class Removal:
    """The removal of a part, and of the parts along with it."""

    def __init__(self, project: Path, name: str) -> None:
        """Read the tables. A part that is not there has nothing to remove."""
        self.project = project
        found = parts(project)
        names = [*found[name].along, name] if name in found else []
        self.gone = [found[each] for each in names if each in found]
        self.kept = [part for part in found.values() if part not in self.gone]
        self.moved = tuple(start for part in self.gone for start in part.moved)

    @cached_property
    def paths(self) -> list[str]:
        """The files of the parts, with their tables and, with the last part, this script."""
        kept = {path for part in self.kept for path in part.paths}
        paths = [path for part in self.gone for path in part.paths if path not in kept]
        paths += [path for part in self.gone for path in part.dependents]
        paths += [f"{PARTS}/{part.name}.py" for part in self.gone]
        return [*dict.fromkeys(paths), *([] if self.kept else [SCRIPT])]

    @property
    def files(self) -> list[str]:
        """Those of them that the project has."""
        return [name for name in self.paths if _is_file(self.project, name)]

    @cached_property
    def files_with_blocks(self) -> set[str]:
        """The files that may have blocks of the parts."""
        return {name for part in self.gone for name in part.files_with_blocks}

    def lines(self, name: str) -> set[str]:
        """Return the marked lines that a file loses."""
        kept = {line for part in self.kept for line in part.lines.get(name, ())}
        return {line for part in self.gone for line in part.lines.get(name, ())} - kept

    @cached_property
    def predecessors(self) -> dict[str, list[str]]:
        """For each migration that goes, the ones that its followers follow from now on."""
        links = {}
        for name in (path for path in self.paths if path.startswith(VERSIONS)):
            text = _read(self.project / name) if _is_file(self.project, name) else ""
            match = DOWN_REVISION.search(text)
            links[Path(name).stem] = _revisions(match[2]) if match else []
        return {revision: _staying(links, revision) for revision in links}

    @property
    def edited(self) -> list[str]:
        """The files that may contain something of the parts."""
        names = {*self.files_with_blocks, *(name for part in self.gone for name in part.lines)}
        found = sorted(names)
        found += [
            f"{VERSIONS}{path.name}" for path in sorted((self.project / VERSIONS).glob("*.py"))
        ]
        found.append(".cruft.json")
        return [name for name in found if _is_file(self.project, name)]

    def edit(self, name: str, text: str) -> str:
        """Return the text of a file without what belongs to the parts."""
        if name == ".cruft.json":
            return self._without_answers(text)
        if name.startswith(VERSIONS):
            return DOWN_REVISION.sub(self._relinked, text)
        if name in self.files_with_blocks:
            text = self._without_blocks(text)
            text = ROW.sub(self._without_row, text)
        lines = self.lines(name)
        return "\n".join(line for line in text.split("\n") if line not in lines)

    def marked(self, text: str) -> list[int]:
        """Return the numbers of the lines that end in a mark of the parts."""
        marks = tuple(f"# {part.name}" for part in self.gone)
        return [number for number, line in enumerate(text.split("\n"), 1) if line.endswith(marks)]

    def _without_answers(self, text: str) -> str:
        """Make updates of the template leave the parts out as well."""
        for part in self.gone:
            # A boolean, or a text from an older version.
            answer = rf'(?<="include_{part.name}": )("[^"\n]*"|\w+)'
            text = re.sub(answer, "false", text)
        return text

    def _without_blocks(self, text: str) -> str:
        for owners in sorted(set(re.findall(BEGIN, text, re.MULTILINE))):
            if self._loses(owners):
                begin = BEGIN.replace(OWNERS, owners)
                end = begin.replace("begin", "end")
                block = f"{begin}(?:(?!{begin}).*\n)*?{end}"
                # A block between two blank lines goes with the second of them.
                for pattern in (rf"(?<=\n\n){block}\n", block):
                    text = re.sub(pattern, "", text, flags=re.MULTILINE)
        return text

    def _without_row(self, row: re.Match[str]) -> str:
        return "" if self._loses(row[1]) else row[0]

    def _loses(self, owners: str) -> bool:
        """Return whether the parts own something, and no part that stays does."""
        names = set(owners.split(" or "))
        is_theirs = any(part.name in names for part in self.gone)
        return is_theirs and not any(part.name in names for part in self.kept)

    def _relinked(self, match: re.Match[str]) -> str:
        """Return the assignment of a migration without the migrations that go."""
        before = _revisions(match[2])
        after = [each for name in before for each in self.predecessors.get(name, [name])]
        if after == before:
            return match[0]
        quote = "'" if "'" in match[2] else '"'
        quoted = [f"{quote}{name}{quote}" for name in dict.fromkeys(after)]
        value = f"({', '.join(quoted)})" if len(quoted) > 1 else "".join(quoted)
        return f"{match[1]}{value or None}"


def _revisions(value: str) -> list[str]:
    """Return the revisions of a text or of a tuple in the source."""
    revisions = ast.literal_eval(value)
    return [revisions] if isinstance(revisions, str) else list(revisions)


def _staying(links: Mapping[str, list[str]], revision: str) -> list[str]:
    """Return the nearest predecessors of a migration that stay."""
    if revision not in links:
        return [revision]
    return [each for before in links[revision] for each in _staying(links, before)]


def remove(project: Path, name: str) -> list[str]:
    """Remove a part from this project. A second run changes nothing.

    Returns a line for each marked line and each file in the part's directories that stays.
    """
    removal = Removal(project, name)
    left = _edit_files(removal)
    _delete_files(removal)
    for part in removal.gone:
        left += _delete_directories(project, part.directories)
    _delete_tables(removal)
    return left


def _edit_files(removal: Removal) -> list[str]:
    """Edit the files that stay; return the places that are marked nevertheless."""
    left: list[str] = []
    for name in removal.edited:
        path = removal.project / name
        before = _read(path)
        after = removal.edit(name, before)
        if after != before:
            path.write_bytes(after.encode(errors="surrogateescape"))
        if not name.startswith(VERSIONS):
            left += [f"{name}:{number}" for number in removal.marked(after)]
    return left


def _delete_files(removal: Removal) -> None:
    """Delete or move the files of the parts."""
    for name in removal.files:
        path = removal.project / name
        if name.startswith(removal.moved):
            target = removal.project / KEPT / name
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        elif not name.startswith((PARTS, SCRIPT)):
            path.unlink()


def _delete_tables(removal: Removal) -> None:
    """Delete the tables of the parts and, after the last one, this script.

    As the last step: an interrupted removal can be repeated.
    """
    for part in removal.gone:
        (removal.project / PARTS / f"{part.name}.py").unlink()
    if not removal.kept:
        _delete_directories(removal.project, [PARTS])
        (removal.project / SCRIPT).unlink(missing_ok=True)


def _is_file(project: Path, name: str) -> bool:
    """Return whether the project has a file, not behind a link: that may lead out of it."""
    path = project / name
    places = (path, *path.parents)
    has_link = any(place.is_symlink() for place in places if project in place.parents)
    return path.is_file() and not has_link


def _delete_directories(project: Path, names: Sequence[str]) -> list[str]:
    """Delete the directories that are empty; return the files in the others."""
    left: list[str] = []
    for name in names:
        directory = project / name
        if not directory.is_dir() or directory.resolve() != project.resolve() / name:
            continue
        shutil.rmtree(directory / "__pycache__", ignore_errors=True)
        files = sorted(path.name for path in directory.iterdir())
        left += [f"{name}/{file}" for file in files]
        if not files:
            directory.rmdir()
    return left


def _read(path: Path) -> str:
    """Return a file as text; bytes that are no text stay as they are when it is written."""
    return path.read_bytes().decode(errors="surrogateescape")


def plan(removal: Removal) -> Iterator[str]:
    """Yield a line for each thing that `remove` does."""
    for verb, is_moved in (("delete", False), (f"move to {KEPT}:", True)):
        names = [name for name in removal.files if name.startswith(removal.moved) == is_moved]
        for directory in sorted({str(Path(name).parent) for name in names}):
            files = [Path(name).name for name in names if str(Path(name).parent) == directory]
            yield f"{verb} {directory}/ {' '.join(files)}"
    for name in removal.edited:
        text = _read(removal.project / name)
        if name not in removal.paths and removal.edit(name, text) != text:
            yield f"edit {name}"


def uncommitted(project: Path) -> list[str]:
    """Return the files with changes that git has not stored.

    Raises `OSError` with the reason if there is no repository.
    """
    command = ["git", "status", "--porcelain", "--", "."]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip().partition("\n")[0])
    return [line[3:] for line in done.stdout.splitlines()]


def own_imports(removal: Removal) -> Iterator[tuple[str, str]]:
    """Yield each import of a removed module in a file that stays: `file:line`, and its path."""
    removed = {_module(name): name for name in removal.paths if name.endswith(".py")}
    for path in _python_files(removal):
        name = path.relative_to(removal.project).as_posix()
        text = _read(path)
        marked = removal.lines(name)
        lines = text.split("\n")
        for number, base, imported in _imports(name, text):
            module = f"{base}.{imported}" if imported else base
            if module not in removed and not _is_module(removal.project, module):
                module = base
            if module in removed and lines[number - 1] not in marked:
                yield f"{name}:{number}", removed[module]


def _python_files(removal: Removal) -> Iterator[Path]:
    """Yield the Python files that stay, without those of environments."""
    for directory, names, files in os.walk(removal.project):
        path = Path(directory)
        names[:] = sorted(
            name
            for name in names
            if not name.startswith(".") and not (path / name / "pyvenv.cfg").exists()
        )
        for file in sorted(files):
            name = (path / file).relative_to(removal.project).as_posix()
            if file.endswith(".py") and name not in removal.paths and not name.startswith(KEPT):
                yield path / file


def _imports(name: str, text: str) -> Iterator[tuple[int, str, str]]:
    """Yield the line of each import, the module, and the imported name if there is one."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            package = name.split("/")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                yield alias.lineno, base, alias.name


def _module(name: str) -> str:
    """Return the dotted name of a Python file."""
    return re.sub(r"(/__init__)?\.py$", "", name).replace("/", ".")


def _is_module(project: Path, module: str) -> bool:
    path = project / module.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def refusals(removal: Removal) -> Iterator[str]:
    """Yield the reasons not to remove the part, each with its remedy; note a missing git."""
    try:
        files = uncommitted(removal.project)
    except OSError as error:
        sys.stdout.write(f"not under git, so that nothing can be restored: {error}\n")
        files = []
    if files:
        shown = ", ".join(files[:MAX_SHOWN])
        more = f" and {len(files) - MAX_SHOWN} more" if len(files) > MAX_SHOWN else ""
        yield f"changes that are not committed: {shown}{more}; commit or stash them"
    for place, name in own_imports(removal):
        remedy = "remove the import"
        if name.startswith(removal.moved) and name.startswith("app/"):
            pattern = Path(name).stem
            remedy += f", or continue with FORCE=1 and then run `make pattern P={pattern}`"
        yield f"{place} imports {_module(name)}; {remedy}"


def cleanup(removal: Removal) -> str:
    """Return the statements for a database that has been migrated with the parts."""
    revisions = ", ".join(f"'{revision}'" for revision in removal.predecessors)
    tables = ", ".join(table for part in removal.gone for table in part.tables)
    statements = DROP_TABLES.format(tables=tables)
    followed = {name for before in removal.predecessors.values() for name in before}
    if len(followed) == 1:
        statements += GO_BACK.format(followed=followed.pop(), revisions=revisions)
    return statements + FORGET.format(revisions=revisions)


def report(title: str, statements: str) -> str:
    """Return the last lines of the output: what a person does next."""
    return f"""\
Removed: {title}. `git status` shows the changes.

`make dev-reset` deletes the development database, which still has the tables of {title}.
Another database that was migrated with them needs these statements before the next `make migrate`.
They delete the data of {title}. Without the first one, its tables stay.

psql "$DATABASE_URL" <<'SQL'
{statements}SQL
"""


def main(arguments: Sequence[str]) -> int:
    """Remove a part from the project of this script, and report what stays."""
    project = Path(__file__).resolve().parent.parent
    name = " ".join(arguments)
    removal = Removal(project, name)
    if removal.kept and not removal.gone:
        present = ", ".join(part.name for part in removal.kept)
        sys.stderr.write(f"{SCRIPT}: part={name}: must be one of {present}\n")
        return 2
    title = removal.gone[-1].title if removal.gone else name
    reasons = list(refusals(removal))
    if reasons and os.environ.get("FORCE") != "1":
        sys.stderr.write("".join(f"{reason}\n" for reason in reasons))
        sys.stderr.write(f"Nothing was removed. FORCE=1 removes {title} nevertheless.\n")
        return 1
    for line in plan(removal):
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
    statements = cleanup(removal)
    try:
        left = remove(project, name)
    except OSError as error:
        sys.stderr.write(f"the removal stopped: {error}\n")
        sys.stderr.write(f"Then repeat it: FORCE=1 python3 {SCRIPT} {name}\n")
        return 1
    for file in left:
        sys.stdout.write(f"kept, since the template did not write it: {file}\n")
    sys.stdout.write(report(title, statements))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
