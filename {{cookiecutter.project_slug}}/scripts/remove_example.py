"""Remove the payments example: its files, all marked lines, and this script.

Only files that the template wrote are deleted or edited, and of their marked lines only those that
the template wrote. A migration of the project's own that follows the example's becomes the first.
The patterns are moved to docs/patterns, where `make pattern` finds them.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

#: The files of the example. The last one is this script: an interrupted run can be repeated.
PATHS = [
    "app/patterns/__init__.py",
    "app/patterns/cache_aside.py",
    "app/patterns/circuit_breaker.py",
    "app/patterns/fail_open.py",
    "app/patterns/http_client.py",
    "app/patterns/idempotency.py",
    "app/patterns/inbox.py",
    "app/patterns/outbox.py",
    "app/patterns/pagination.py",
    "app/patterns/periodic.py",
    "app/patterns/rate_limit.py",
    "app/patterns/schedule.py",
    "app/patterns/stream_consumer.py",
    "app/patterns/stream_group.py",
    "app/patterns/stream_handler.py",
    "app/payments/__init__.py",
    "app/payments/consumer.py",
    "app/payments/events.py",
    "app/payments/gateway.py",
    "app/payments/repository.py",
    "app/payments/router.py",
    "app/payments/schemas.py",
    "app/payments/service.py",
    "deploy/k8s/components/consumer/deployment.yaml",
    "deploy/k8s/components/consumer/kustomization.yaml",
    "deploy/k8s/components/consumer/service.yaml",
    "deploy/k8s/components/gateway-egress/kustomization.yaml",
    "deploy/k8s/components/gateway-egress/networkpolicy.yaml",
    "deploy/k8s/components/prometheusrule/payments.yaml",
    "deploy/observe/prometheus/rules/payments.yaml",
    "deploy/observe/prometheus/tests/payments.yaml",
    "migrations/versions/0001_payments.py",
    "migrations/versions/0002_patterns.py",
    "migrations/versions/0002b_outbox_traceparent.py",
    "scripts/dev_consumer.py",
    "scripts/fake_gateway.py",
    "scripts/quiet_http.py",
    "scripts/tail_events.py",
    "tests/patterns/__init__.py",
    "tests/patterns/conftest.py",
    "tests/patterns/test_cache_aside.py",
    "tests/patterns/test_circuit_breaker.py",
    "tests/patterns/test_fail_open.py",
    "tests/patterns/test_http_client.py",
    "tests/patterns/test_idempotency.py",
    "tests/patterns/test_inbox.py",
    "tests/patterns/test_outbox.py",
    "tests/patterns/test_pagination.py",
    "tests/patterns/test_periodic.py",
    "tests/patterns/test_rate_limit.py",
    "tests/patterns/test_schedule.py",
    "tests/patterns/test_stream.py",
    "tests/payments/__init__.py",
    "tests/payments/conftest.py",
    "tests/payments/test_consumer.py",
    "tests/payments/test_gateway_tls.py",
    "tests/payments/test_payments.py",
    "tests/payments/test_redis.py",
    "tests/payments/test_trace.py",
    "scripts/remove_example.py",
]
#: The directories that have other files as well.
SHARED = {
    "deploy/k8s/components/prometheusrule",
    "deploy/observe/grafana/dashboards",
    "deploy/observe/prometheus/rules",
    "deploy/observe/prometheus/tests",
    "migrations/versions",
    "scripts",
}
#: The directory that keeps the patterns, and the files of the example that move there.
PATTERNS = "docs/patterns"
MOVED = (
    "app/patterns/",
    "migrations/versions/0002_patterns.py",
    "migrations/versions/0002b_outbox_traceparent.py",
    "scripts/quiet_http.py",
    "tests/patterns/",
)
#: Files with blocks between `example: begin` and `example: end`, or with marked rows of tables.
FILES_WITH_BLOCKS = [
    ".env.example",
    "Makefile",
    "README.md",
    "app/setting_types.py",
    "app/settings.py",
    "compose.yaml",
    "docs/alerts.md",
    "docs/patterns.md",
    "docs/runbook.md",
    "scripts/seed.py",
]
#: The marked lines of code. Other lines that end in `# example` are the team's.
LINES = {
    "deploy/k8s/components/prometheusrule/kustomization.yaml": ["  - payments.yaml # example"],
    "Makefile": ["PARTS += consumer gateway # example"],
    "app/__init__.py": [
        "payments/            a feature: what a team writes  # example",
        "    router.py  service.py  repository.py  schemas.py  # example",
        "    events.py  gateway.py  consumer.py  # example",
        "patterns/            building blocks to copy  # example",
        "    idempotency.py  pagination.py  rate_limit.py  cache_aside.py  fail_open.py  # example",
        "    outbox.py  inbox.py  periodic.py  schedule.py  # example",
        "    stream_consumer.py  stream_handler.py  stream_group.py  # example",
        "    http_client.py  circuit_breaker.py  # example",
    ],
    "app/lifespan.py": [
        "from app.payments.service import Payments, open_payments  # example",
        "    payments: Payments  # example",
        "        payments = await enter(open_payments(settings, storage))  # example",
        '            "payments": payments,  # example',
    ],
    "app/main.py": [
        "from app.payments.router import router as payments_router  # example",
        "    app.include_router(payments_router)  # example",
    ],
    "app/settings.py": ["    HttpUrl,  # example"],
    "pyproject.toml": [
        '    "httpx>=0.28,<1", # example',
        '    "stamina>=26,<27", # example',
        '    "hypothesis>=6,<7", # example',
        '    "(payments)", # example',
        '    "(patterns)", # example',
    ],
    "scripts/dev.py": [
        "from scripts.dev_consumer import consuming  # example",
        "        stack.enter_context(consuming())  # example",
    ],
    "scripts/seed.py": ["    (CREATE_PAYMENT, PAYMENTS)  # example"],
    "tests/serving/test_addresses.py": [
        'COMMANDS += [("app.payments.consumer", False)]  # example'
    ],
    "tests/serving/test_processes.py": [
        '        payment = {"amount": 1, "currency": "EUR", "reference": "a"}  # example',
        '        headers = {"Idempotency-Key": "a"}  # example',
        '        created = service.http.post("/payments", json=payment, headers=headers)'
        "  # example",
        '        assert created.headers["location"].startswith("/api/payments/")  # example',
    ],
}
MARK = "# example"

BEGIN = r"^[ ]*(?:#|<!--) example: begin(?: -->)?\n"
END = r"^[ ]*(?:#|<!--) example: end(?: -->)?\n"
BLOCK = re.compile(f"{BEGIN}(?:(?!{BEGIN}).*\n)*?{END}", re.MULTILINE)
#: A block between two blank lines, with the second of them: one must stay.
BLOCK_BETWEEN_BLANK_LINES = re.compile(rf"(?<=\n\n){BLOCK.pattern}\n", re.MULTILINE)
#: A marked row of a table in Markdown.
MARKED_ROW = re.compile(r"^.*<!-- example --> \|\n", re.MULTILINE)
#: In a migration of the project's own that follows one of the example's.
FOLLOWS_EXAMPLE = re.compile(
    r"""^(down_revision\b.*= )["'](0001_payments|0002_patterns|0002b_outbox_traceparent)["']$""",
    re.MULTILINE,
)
#: In the file of cruft: a boolean, or a text from an older version.
STORED_ANSWER = re.compile(r'(?<="include_example": )[^,\n]+')


#: Statements for a database that has been migrated with the example.
CLEANUP = """\
drop table if exists payments, idempotency_keys, outbox, inbox, schedule;
delete from alembic_version
where version_num in ('0001_payments', '0002_patterns', '0002b_outbox_traceparent');
"""
DATABASES = f"""
`make dev-reset` deletes the development database, which still has the tables of the example.
Another database that was migrated with it needs these statements before the next `make migrate`.
They delete the data of the example. Without the first one, its tables stay.

psql "$DATABASE_URL" <<'SQL'
{CLEANUP}SQL
"""
MAX_SHOWN = 5


def remove(project: Path) -> list[str]:
    """Remove the example from this project. A second run changes nothing.

    Returns a line for each marked line and each file in the example's directories that stays.
    """
    left: list[str] = []
    for name in _edited_files(project):
        text = _read(project / name)
        edited = edit(name, text)
        _write(project / name, text, edited)
        lines = edited.split("\n")
        if name in {*FILES_WITH_BLOCKS, *LINES}:
            numbers = [number for number, line in enumerate(lines, 1) if line.endswith(MARK)]
            left += [f"{name}:{number}" for number in numbers]
    for name in _files(project):
        if name.startswith(MOVED):
            target = project / PATTERNS / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (project / name).replace(target)
        else:
            (project / name).unlink()
    left += _delete_directories(project)
    return left


def edit(name: str, text: str) -> str:
    """Return the text of a file without what belongs to the example."""
    if name == ".cruft.json":
        # Updates of the template leave the example out as well.
        return STORED_ANSWER.sub("false", text)
    if name.startswith("migrations/"):
        return FOLLOWS_EXAMPLE.sub(r"\1None", text)
    if name in FILES_WITH_BLOCKS:
        for pattern in (BLOCK_BETWEEN_BLANK_LINES, BLOCK, MARKED_ROW):
            text = pattern.sub("", text)
    marked = LINES.get(name, [])
    return "\n".join(line for line in text.split("\n") if line not in marked)


def _edited_files(project: Path) -> list[str]:
    """Return the files that may contain parts of the example."""
    versions = sorted((project / "migrations/versions").glob("*.py"))
    names = sorted({*FILES_WITH_BLOCKS, *LINES})
    names += [f"migrations/versions/{path.name}" for path in versions]
    names.append(".cruft.json")
    return [name for name in names if _is_inside(project, name) and (project / name).is_file()]


def _files(project: Path) -> list[str]:
    """Return the files of the example that the project has."""
    return [name for name in PATHS if _is_inside(project, name) and (project / name).is_file()]


def _is_inside(project: Path, name: str) -> bool:
    """Return whether the path has no link, which may lead out of the project."""
    path = project / name
    return not any(each.is_symlink() for each in (path, *path.parents) if project in each.parents)


def _delete_directories(project: Path) -> list[str]:
    """Delete directories of the example that are empty; return the files in the others."""
    left: list[str] = []
    directories = {str(Path(name).parent) for name in PATHS if (project / name).parent.is_dir()}
    for name in sorted(directories - SHARED):
        if not _is_inside(project, name):
            continue
        shutil.rmtree(project / name / "__pycache__", ignore_errors=True)
        files = sorted(path.name for path in (project / name).iterdir())
        left += [f"{name}/{file}" for file in files]
        if not files:
            (project / name).rmdir()
    return left


def _read(path: Path) -> str:
    """Return a file as text; bytes that are no text stay as they are in `_write`."""
    return path.read_bytes().decode(errors="surrogateescape")


def _write(path: Path, before: str, text: str) -> None:
    if text != before:
        path.write_bytes(text.encode(errors="surrogateescape"))


def plan(project: Path) -> Iterator[str]:
    """Yield a line for each thing that `remove` does."""
    for verb, is_moved in (("delete", False), (f"move to {PATTERNS}:", True)):
        names = [name for name in _files(project) if name.startswith(MOVED) == is_moved]
        for directory in sorted({str(Path(name).parent) for name in names}):
            files = [Path(name).name for name in names if str(Path(name).parent) == directory]
            yield f"{verb} {directory}/ {' '.join(files)}"
    for name in _edited_files(project):
        text = _read(project / name)
        if name not in PATHS and edit(name, text) != text:
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


def own_imports(project: Path) -> Iterator[tuple[str, str]]:
    """Yield each import of a removed module in a file that stays: `file:line`, and the module."""
    removed = {_module(name) for name in PATHS if name.endswith(".py")}
    for path in _python_files(project):
        name = path.relative_to(project).as_posix()
        text = _read(path)
        marked = LINES.get(name, [])
        lines = text.split("\n")
        for number, base, imported in _imports(name, text):
            module = f"{base}.{imported}" if imported else base
            if module not in removed and not _is_module(project, module):
                module = base
            if module in removed and lines[number - 1] not in marked:
                yield f"{name}:{number}", module


def _python_files(project: Path) -> Iterator[Path]:
    """Yield the Python files that stay, without those of environments."""
    for directory, names, files in os.walk(project):
        path = Path(directory)
        names[:] = sorted(
            name
            for name in names
            if not name.startswith(".") and not (path / name / "pyvenv.cfg").exists()
        )
        for file in sorted(files):
            name = (path / file).relative_to(project).as_posix()
            if file.endswith(".py") and name not in PATHS and not name.startswith(PATTERNS):
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
                yield node.lineno, base, alias.name


def _module(name: str) -> str:
    """Return the dotted name of a Python file."""
    return re.sub(r"(/__init__)?\.py$", "", name).replace("/", ".")


def _is_module(project: Path, module: str) -> bool:
    path = project / module.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def refusals(project: Path) -> Iterator[str]:
    """Yield the reasons not to remove the example, each with its remedy; note a missing git."""
    try:
        files = uncommitted(project)
    except OSError as error:
        sys.stdout.write(f"not under git, so that nothing can be restored: {error}\n")
        files = []
    if files:
        shown = ", ".join(files[:MAX_SHOWN])
        more = f" and {len(files) - MAX_SHOWN} more" if len(files) > MAX_SHOWN else ""
        yield f"changes that are not committed: {shown}{more}; commit or stash them"
    for place, module in own_imports(project):
        remedy = "remove the import"
        if module.startswith("app.patterns."):
            pattern = module.rpartition(".")[2]
            remedy += f", or continue with FORCE=1 and then run `make pattern P={pattern}`"
        yield f"{place} imports {module}; {remedy}"


def main() -> int:
    """Remove the example from the project of this script, and report what stays."""
    project = Path(__file__).resolve().parent.parent
    reasons = list(refusals(project))
    if reasons and os.environ.get("FORCE") != "1":
        sys.stderr.write("".join(f"{reason}\n" for reason in reasons))
        sys.stderr.write("Nothing was removed. FORCE=1 removes the example nevertheless.\n")
        return 1
    for line in plan(project):
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
    left = remove(project)
    for name in left:
        sys.stdout.write(f"kept, since the template did not write it: {name}\n")
    sys.stdout.write(f"The example is removed. `git status` shows the changes.\n{DATABASES}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
