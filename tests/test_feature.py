"""`make feature` writes a feature that is green at once, or nothing.

The types of one are checked at the end of its guide: test_first_feature.py.
"""

import os
import re
import runpy
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, SERVICE_BIN, SOURCE, bake_to, missing, tree
from tests.projects import copy_types, environment, make

FEATURE = ROOT / SOURCE / "scripts/feature"
NAMES: dict[str, Any] = runpy.run_path(str(FEATURE / "names.py"))
EDITS: dict[str, Any] = runpy.run_path(str(FEATURE / "edits.py"))


def read_default(name: str) -> str:
    """Return a file of the service as in a project with the default answers, without jobs."""
    text = (ROOT / SOURCE / name).read_text()
    return re.sub(r".*# (jobs|conversations)\n", "", text)


MAIN = read_default("app/main.py")
METADATA = read_default("pyproject.toml")
LINES = ("from app.orders.router import router as orders_router", ".include_router(orders_router)")


# Names


@pytest.mark.parametrize(
    ("plural", "singular"),
    [
        ("orders", "order"),
        ("categories", "category"),
        ("addresses", "address"),
        ("boxes", "box"),
        ("batches", "batch"),
        ("databases", "database"),
        ("movies", "movie"),
        ("ties", "tie"),
        ("people", "person"),
        ("line_items", "line_item"),
        ("order_statuses", "order_status"),
        ("v2_orders", "v2_order"),
    ],
)
def test_singular_is_derived(plural: str, singular: str) -> None:
    assert NAMES["parse"](plural).singular == singular


def test_class_is_named_by_the_singular() -> None:
    assert NAMES["parse"]("line_items").class_name == "LineItem"
    assert NAMES["parse"]("feedback", "feedback").class_name == "Feedback"


@pytest.mark.parametrize(
    ("plural", "singular", "message"),
    [
        ("Orders", "", "N=Orders: must be lower-case"),
        ("line-items", "", "N=line-items: must be lower-case"),
        ("1orders", "", "N=1orders: must be lower-case"),
        ("_orders", "", "N=_orders: must be lower-case"),
        ("orders; rm -r .", "", "N=orders; rm -r .: must be lower-case"),
        ("../orders", "", "N=../orders: must be lower-case"),
        ("bücher", "", r"N=b\xfccher: must be lower-case"),
        ("orders\n", "", r"N=orders\n: must be lower-case"),
        ("app", "", "N=app: is a name of the application itself"),
        ("docs", "", "N=docs: is a name of the application itself"),
        ("class", "", "N=class: is a keyword of Python"),
        ("nones", "", "S=none: is a keyword of Python"),
        ("references", "", "N=references: is reserved in Postgres"),
        ("x" * 30 + "s", "", f"N={'x' * 30}s: has 31 characters, must have at most 30, "),
        ("sheep", "", "N=sheep: its singular is not known; add it, for example make feature"),
        ("business", "", "N=business: its singular is not known"),
        ("people", "Person", "S=Person: must be lower-case"),
    ],
)
def test_invalid_name_is_rejected(plural: str, singular: str, message: str) -> None:
    """Postgres, "Identifiers and Key Words": 63 bytes, and reserved words."""
    with pytest.raises(NAMES["InvalidNameError"]) as raised:
        NAMES["parse"](plural, singular)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


# Files that the team edits


@pytest.mark.parametrize(
    ("before", "after", "follows"),
    [
        ("", "", "    app.include_router(payments_router)  # example"),
        ("    app.include_router(payments_router)  # example\n", "", "(health.router)"),
        (
            "    app.include_router(payments_router)  # example\n",
            "    for router in (a.router, b.router):\n        app.include_router(router)\n",
            "        app.include_router(router)",
        ),
        (
            "    app.include_router(payments_router)  # example\n",
            "    app.include_router(\n        a.router,\n        prefix='/a',\n    )\n",
            "    )",
        ),
        (
            "    app.include_router(payments_router)  # example\n    return app\n",
            "    app.mount('/', files)\n    app.state.team = 1\n    return wrap(app)\n",
            "(health.router)",
        ),
        (
            MAIN[MAIN.index("    app.include_router(health") : MAIN.index("    return app\n")],
            "    install(app)\n",
            "    install(app)",
        ),
    ],
)
def test_router_is_included_among_the_edits_of_a_team(
    before: str, after: str, follows: str
) -> None:
    """After the last router, so before a catch-all."""
    edited = EDITS["add_router"](MAIN.replace(before, after, 1), "orders")
    compile(edited, "main.py", "exec")
    lines = edited.split("\n")
    place = lines.index("    app.include_router(orders_router)")
    assert lines[place - 1].endswith(follows)
    assert lines.count(LINES[0]) == 1


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("def create_app(", "def make_app(", "app/main.py has no place for the router of orders"),
        ("from app", "from acme", "app/main.py has no place for the router of orders"),
        ("def create_app(", "def create_app((", "app/main.py: line "),
    ],
)
def test_router_without_a_place_is_reported(before: str, after: str, message: str) -> None:
    with pytest.raises(EDITS["NoPlaceError"]) as raised:
        EDITS["add_router"](MAIN.replace(before, after), "orders")
    assert str(raised.value).startswith(message)
    if "line " not in message:
        assert all(line in str(raised.value) for line in LINES)


@pytest.mark.parametrize(
    ("before", "after", "layer"),
    [
        ("", "", '    "orders",'),
        ('    "(payments)", # example\n', "", '    "orders",'),
        (
            '    "(payments)", # example\n',
            '    "invoices",\n    "(payments)", # example\n',
            '    "invoices | orders",',
        ),
        ('    "(payments)", # example', '    "refunds", # ours', '    "refunds | orders", # ours'),
        ('"(payments)", # example', '"(payments) | a", # ours', '    "(payments) | a | orders", #'),
    ],
)
def test_layer_is_added_among_the_edits_of_a_team(before: str, after: str, layer: str) -> None:
    edited = EDITS["add_layer"](METADATA.replace(before, after, 1), "orders")
    (line,) = set(edited.split("\n")) - set(METADATA.replace(before, after, 1).split("\n"))
    assert line.startswith(layer)


def test_layer_of_an_example_stays_as_it_is() -> None:
    """Its removal finds its line by the whole text."""
    text = (ROOT / SOURCE / "pyproject.toml").read_text()
    edited = EDITS["add_layer"](text, "orders")
    (line,) = set(edited.split("\n")) - set(text.split("\n"))
    assert line == '    "orders",'


def test_layer_without_a_place_is_reported() -> None:
    with pytest.raises(EDITS["NoPlaceError"], match=r'add a line "orders", between .* by hand'):
        EDITS["add_layer"](METADATA.replace('    "process",\n', ""), "orders")
    assert EDITS["add_layer"]("[project]\n", "orders") == "[project]\n"


# Projects


def link_environment(project: Path) -> None:
    """Give a project the environment of the service, without installing it again.

    Its Python is a script that runs the service's own. So the modules have one path in all
    projects, and are compiled once.
    """
    python = SERVICE_BIN / "python"
    if not (SERVICE_BIN / "alembic").exists():
        missing(f"{SERVICE_BIN}, which `make setup` installs,")
    venv = project / ".venv"
    for directory in ("bin", "cache/coverage"):
        (venv / directory).mkdir(parents=True)
    for path in SERVICE_BIN.iterdir():
        if not path.name.startswith("python"):
            (venv / "bin" / path.name).symlink_to(path)
    (venv / "bin/python").write_text(f'#!/bin/sh\nexec {shlex.quote(str(python))} "$@"\n')
    (venv / "bin/python").chmod(0o755)
    compiled = SERVICE_BIN.parent / "cache/pycache"
    compiled.mkdir(parents=True, exist_ok=True)
    (venv / "cache/pycache").symlink_to(compiled)
    copy_types(venv / "cache/mypy")
    (venv / "ready").touch()


def run(project: Path, *command: str) -> str:
    """Run a program of the project's environment; return its output, fail with it."""
    cache = {"PYTHONPYCACHEPREFIX": str(project / ".venv/cache/pycache")}
    inherited = {name: os.environ[name] for name in os.environ if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [str(project / ".venv/bin" / command[0]), *command[1:]],
        cwd=project,
        env=inherited | cache,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    output = done.stdout.decode()
    assert done.returncode == 0, output
    return output


def check(project: Path) -> None:
    """Run the checks of `make lint`, which reports files without the cache as well."""
    run(project, "ruff", "check", "--no-cache", ".")
    run(project, "ruff", "format", "--no-cache", "--check", ".")
    run(project, "lint-imports", "--no-cache", "--no-logo")


@pytest.fixture(scope="module", params=[True, False], ids=["example", "no example"])
def project(
    template: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """A project in a path with spaces, without git, with and without the example."""
    output = tmp_path_factory.mktemp("it's a project")
    project = bake_to(template, output, include_example=request.param)
    link_environment(project)
    return project


@pytest.fixture(scope="module")
def example(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the example."""
    project = bake_to(template, tmp_path_factory.mktemp("project"))
    link_environment(project)
    return project


def feature(project: Path, **names: str) -> subprocess.CompletedProcess[str]:
    """Run `make feature` with `N` and `S`; the caller checks its exit status."""
    return subprocess.run(
        ["make", "--silent", "feature"],
        cwd=project,
        env=environment(**names) | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def sources(project: Path) -> dict[str, bytes]:
    """Return the files of the project without those of its environment."""
    files = tree(project)
    return {name: files[name] for name in files if not name.startswith(".venv/")}


def rejected(project: Path, **names: str) -> str:
    """Run `make feature`, which must fail and change nothing; return its line."""
    before = sources(project)
    done = feature(project, **names)
    assert done.returncode != 0
    assert sources(project) == before
    line, *of_make = done.stderr.splitlines()
    assert all(each.startswith("make") for each in of_make), done.stderr
    return line


@pytest.mark.slow
def test_feature_is_green_at_once(project: Path) -> None:
    """Several features of one project, whose migrations follow each other."""
    longest = f"{'x' * 28}es"
    for names in ({"N": "orders"}, {"N": "people", "S": "person"}, {"N": longest}):
        done = feature(project, **names)
        assert done.returncode == 0, done.stderr
        assert f"make test T=tests/{names['N']}" in done.stdout
    check(project)
    history = run(project, "alembic", "history")
    heads = re.findall(r"\(head\), (\w+)", history.replace("Create the table ", ""))
    assert heads == [longest]
    tests = ["tests/orders", "tests/people"]
    output = run(project, "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    assert " passed" in output
    assert " failed" not in output


@pytest.mark.slow
def test_feature_outlives_the_example(example: Path) -> None:
    project = example
    feature(project, N="invoices")
    make(project, "remove-example")
    assert "invoices" in run(project, "alembic", "heads", "--verbose")
    assert feature(project, N="receipts").returncode == 0
    check(project)


@pytest.mark.slow
def test_feature_that_cannot_be_written_changes_nothing(example: Path) -> None:
    project = example
    assert (
        rejected(project)
        == "N is missing: make feature N=orders, or make feature N=people S=person"
    )
    assert rejected(project, N="storage", S="x").startswith("N=storage: app/storage exists; ")
    assert rejected(project, N="pages").startswith("S=page: its class Page would hide another")
    assert rejected(project, N="Orders").startswith("N=Orders: must be lower-case words")
    main = project / "app/main.py"
    text = main.read_text()
    main.write_text(text.replace("def create_app(", "def make_app("))
    line = rejected(project, N="tickets")
    assert (
        "add these lines by hand: `from app.tickets.router import router as tickets_router`" in line
    )
    main.write_text(text)
    # The last step fails, which formats the written files.
    metadata = project / "pyproject.toml"
    text = metadata.read_text()
    metadata.write_text(text.replace("line-length = 100", "line-length = -1"))
    assert rejected(project, N="tickets").startswith("nothing was written: ruff check failed: ")
    metadata.write_text(text)


@pytest.mark.slow
def test_feature_follows_no_two_migrations(example: Path) -> None:
    project = example
    versions = project / "migrations/versions"
    for name in ("left", "right"):
        text = f'revision = "{name}"\ndown_revision = None\n'
        (versions / f"{name}.py").write_text(text)
    line = rejected(project, N="tickets")
    assert line.startswith("several migrations are the newest, ")
    assert "alembic merge heads" in line
    (versions / "right.py").write_text("revision = (\n")
    assert rejected(project, N="tickets").startswith("migrations/versions: ")
    for name in ("left", "right"):
        (versions / f"{name}.py").unlink()
