"""Remove the payments example: its files, all marked lines, and this script.

Only files that the template wrote are deleted or edited, and of their marked lines only those that
the template wrote. A migration of the project's own that follows the example's becomes the first.
"""

from __future__ import annotations

import re
import shutil
import sys
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
    "migrations/versions/0001_payments.py",
    "migrations/versions/0002_patterns.py",
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
    "tests/patterns/test_rate_limit.py",
    "tests/patterns/test_stream.py",
    "tests/payments/__init__.py",
    "tests/payments/test_consumer.py",
    "tests/payments/test_gateway_tls.py",
    "tests/payments/test_payments.py",
    "tests/payments/test_redis.py",
    "scripts/remove_example.py",
]
#: Files with blocks between `example: begin` and `example: end`, or with marked rows of tables.
FILES_WITH_BLOCKS = [
    ".env.example",
    "Makefile",
    "README.md",
    "app/setting_types.py",
    "app/settings.py",
    "compose.yaml",
    "docs/runbook.md",
    "scripts/seed.py",
]
#: The marked lines of code. Other lines that end in `# example` are the team's.
LINES = {
    "Makefile": ["PARTS += consumer gateway # example"],
    "app/__init__.py": [
        "payments/            a feature: what a team writes  # example",
        "    router.py  service.py  repository.py  schemas.py  # example",
        "    events.py  gateway.py  consumer.py  # example",
        "patterns/            building blocks to copy  # example",
        "    idempotency.py  pagination.py  rate_limit.py  cache_aside.py  fail_open.py  # example",
        "    outbox.py  inbox.py  periodic.py  # example",
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
    r"""^(down_revision\b.*= )["'](0001_payments|0002_patterns)["']$""", re.MULTILINE
)
#: In the file of cruft: a boolean, or a text from an older version.
STORED_ANSWER = re.compile(r'(?<="include_example": )[^,\n]+')


def remove(project: Path) -> list[str]:
    """Remove the example from this project. A second run changes nothing.

    Returns a line for each marked line and each file in the example's directories that stays.
    """
    left: list[str] = []
    for name in sorted({*FILES_WITH_BLOCKS, *LINES}):
        if _is_inside(project, name) and (project / name).is_file():
            left += _edit(project / name, name)
    for path in sorted((project / "migrations/versions").glob("*.py")):
        if _is_inside(project, f"migrations/versions/{path.name}"):
            _substitute(path, FOLLOWS_EXAMPLE, r"\1None")
    # Updates of the template leave the example out as well.
    if (project / ".cruft.json").is_file():
        _substitute(project / ".cruft.json", STORED_ANSWER, "false")
    for name in PATHS:
        if _is_inside(project, name):
            (project / name).unlink(missing_ok=True)
    left += _delete_directories(project)
    return left


def _is_inside(project: Path, name: str) -> bool:
    """Return whether the path has no link, which may lead out of the project."""
    path = project / name
    return not any(each.is_symlink() for each in (path, *path.parents) if project in each.parents)


def _delete_directories(project: Path) -> list[str]:
    """Delete directories of the example that are empty; return the files in the others."""
    left: list[str] = []
    directories = {str(Path(name).parent) for name in PATHS if (project / name).parent.is_dir()}
    for name in sorted(directories - {"migrations/versions", "scripts"}):
        if not _is_inside(project, name):
            continue
        shutil.rmtree(project / name / "__pycache__", ignore_errors=True)
        files = sorted(path.name for path in (project / name).iterdir())
        left += [f"{name}/{file}" for file in files]
        if not files:
            (project / name).rmdir()
    return left


def _edit(path: Path, name: str) -> list[str]:
    """Remove the marked parts of a file; return the marked lines that stay."""
    if name in FILES_WITH_BLOCKS:
        for pattern in (BLOCK_BETWEEN_BLANK_LINES, BLOCK, MARKED_ROW):
            _substitute(path, pattern, "")
    marked = LINES.get(name, [])
    text = _read(path)
    lines = [line for line in text.split("\n") if line not in marked]
    _write(path, text, "\n".join(lines))
    numbers = [number for number, line in enumerate(lines, 1) if line.endswith(MARK)]
    return [f"{name}:{number}" for number in numbers]


def _substitute(path: Path, pattern: re.Pattern[str], replacement: str) -> None:
    text = _read(path)
    _write(path, text, pattern.sub(replacement, text))


def _read(path: Path) -> str:
    """Return a file as text; bytes that are no text stay as they are in `_write`."""
    return path.read_bytes().decode(errors="surrogateescape")


def _write(path: Path, before: str, text: str) -> None:
    if text != before:
        path.write_bytes(text.encode(errors="surrogateescape"))


def main() -> None:
    """Remove the example from the project of this script, and report what stays."""
    left = remove(Path(__file__).resolve().parent.parent)
    sys.stdout.write(
        "The example is removed: see `git status`. Databases that were migrated with it keep it.\n"
    )
    for name in left:
        sys.stdout.write(f"kept, since the template did not write it: {name}\n")


if __name__ == "__main__":
    main()
