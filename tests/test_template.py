"""What the template is made of: readable as it stands, and complete when baked."""

import ast
import json
import re
import subprocess
import sys
import time
import tokenize
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.conftest import JINJA_ALLOWED, ROOT, SOURCE, Bake, tracked, tree

JINJA = re.compile(r"{{|{%|{#")
ANSWERS = "{{ cookiecutter | tojson }}"
PATTERNS = (
    *(
        "batches",
        "breaker",
        "cache_fence",
        "client",
        "fail_open",
        "idempotency",
        "inbox",
        "keyset",
        "outbox",
    ),
    *(
        "probed_process",
        "rate_limit",
        "stream_consumer",
        "stream_group",
        "stream_handler",
        "unbroken",
    ),
)
EXAMPLE_ONLY = {
    *(
        f"deploy/k8s/components/consumer/{name}.yaml"
        for name in ("deployment", "kustomization", "service")
    ),
    *(
        f"deploy/k8s/components/gateway-egress/{name}.yaml"
        for name in ("kustomization", "networkpolicy")
    ),
    *(f"app/patterns/{name}.py" for name in ("__init__", *PATTERNS)),
    *(
        f"app/payments/{name}.py"
        for name in ("__init__", "consumer", "repository", "router", "schemas", "service")
    ),
    *("migrations/versions/0001_payments.py", "migrations/versions/0002_patterns.py"),
    *("scripts/tail_events.py", "scripts/fake_gateway.py", "scripts/remove_example.py"),
    *(
        f"tests/patterns/{name}.py"
        for name in ("__init__", "conftest", "test_breaker", "test_cache_fence")
    ),
    *(
        f"tests/patterns/test_{name}.py"
        for name in (
            "client",
            "fail_open",
            "idempotency",
            "inbox",
            "outbox",
            "rate_limit",
            "stream",
        )
    ),
    *(f"tests/payments/{name}.py" for name in ("__init__", "test_consumer", "test_payments")),
}
#: What a feature meets, and what serves it and tells about it.
APPLICATION = (
    *(
        "background",
        "cache",
        "database",
        "errors",
        "health",
        "lifespan",
        "limits",
        "log",
        "main",
        "observe",
    ),
    *("outage", "request_head", "setting_types", "settings"),
)
SERVER = (
    *(
        "access_log",
        "answering",
        "healthcheck",
        "listener",
        "machine",
        "master",
        "metrics",
        "metrics_folder",
        "metrics_server",
        "plan",
    ),
    *("protocol", "server", "sizing", "websocket", "worker"),
)
COMPONENTS = (
    "egress-https",
    "egress-otlp",
    "egress-pgbouncer",
    "httproute",
    "servicemonitor",
    "userns",
)
ALWAYS = {
    *(
        ".env.example",
        ".gitattributes",
        ".gitignore",
        "Makefile",
        "README.md",
        "alembic.ini",
        "gunicorn.conf.py",
    ),
    *("pyproject.toml", "requirements.txt", "requirements-dev.txt", "requirements-k8s.txt"),
    *(
        "docs/runbook.md",
        "Dockerfile",
        ".dockerignore",
        "compose.yaml",
        "deploy/compose/nginx.conf",
    ),
    *(".github/dependabot.yml", ".github/workflows/ci.yml", ".github/workflows/release.yml"),
    *("migrations/env.py", "migrations/script.py.mako", "migrations/versions/.gitkeep"),
    *(
        "scripts/__init__.py",
        "scripts/compose_secrets.py",
        "scripts/dev.py",
        "scripts/dev_services.py",
    ),
    *(f"app/{name}.py" for name in ("__init__", *APPLICATION, *SERVER)),
    *(
        f"tests/{name}.py"
        for name in ("__init__", "conftest", "faulty", "process", "test_health", "test_http")
    ),
    *(
        f"tests/test_{name}.py"
        for name in ("contract", "end", "lifespan", "limits", "log", "metrics", "migrations")
    ),
    *(f"tests/test_{name}.py" for name in ("database", "process", "settings")),
    *("tests/test_services.py", "tests/test_sizing.py", "tests/deploy/test_deploy.py"),
    *(
        f"tests/deploy/{name}.py"
        for name in ("__init__", "compose", "deployed", "image", "numbers", "objects", "rules")
    ),
    *(
        f"deploy/k8s/base/{name}.yaml"
        for name in ("deployment", "hpa", "kustomization", "migrate", "namespace")
    ),
    *(
        f"deploy/k8s/base/{name}.yaml"
        for name in ("networkpolicy", "pdb", "service", "serviceaccount")
    ),
    *(f"deploy/k8s/overlays/{name}/kustomization.yaml" for name in ("dev", "staging", "prod")),
    *(f"deploy/k8s/components/{name}/kustomization.yaml" for name in COMPONENTS),
    *(f"deploy/k8s/components/{name}/{name}.yaml" for name in ("httproute", "servicemonitor")),
}


def sources() -> list[str]:
    return [name for name in tracked() if name.startswith((SOURCE, "hooks/", "cookiecutter.json"))]


@pytest.mark.parametrize("name", tracked())
def test_raw_files_parse(name: str) -> None:
    path = ROOT / name
    if path.suffix == ".py":
        ast.parse(path.read_text())
    elif path.suffix == ".toml":
        tomllib.loads(path.read_text())
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix in {".yaml", ".yml"}:
        list(yaml.safe_load_all(path.read_text()))


def test_jinja_stands_only_where_it_is_allowed() -> None:
    strangers = [
        name
        for name in sources()
        if not JINJA_ALLOWED.fullmatch(name)
        and name.endswith((".toml", ".txt", "Makefile", ".example", ".ini", ".yaml"))
        if JINJA.search((ROOT / name).read_text())
    ]
    assert strangers == []
    for name in sources():
        if name.endswith(".yml"):  # what GitHub fills in has a dollar sign before it
            assert not JINJA.search((ROOT / name).read_text().replace("${{", "")), name


def test_no_python_of_the_service_is_rendered() -> None:
    """Braces are Python's there; cookiecutter copies the files as they are."""
    patterns = json.loads((ROOT / "cookiecutter.json").read_text())["_copy_without_render"]
    rendered = [
        name for name in sources() if name.startswith(SOURCE) and JINJA_ALLOWED.fullmatch(name)
    ]
    copied = [
        name for name in sources() if name.startswith(SOURCE) and not JINJA_ALLOWED.fullmatch(name)
    ]
    matches = [name for name in copied if any(Path(name).match(pattern) for pattern in patterns)]
    assert matches == copied
    assert not any(Path(name).match(pattern) for name in rendered for pattern in patterns)


def test_hooks_read_answers_as_data_in_one_place() -> None:
    for name in ("hooks/pre_gen_project.py", "hooks/post_gen_project.py"):
        text = (ROOT / name).read_text()
        assert text.count(ANSWERS) == 1
        assert not JINJA.search(text.replace(ANSWERS, ""))


def test_hooks_need_the_standard_library_alone() -> None:
    for name in ("hooks/pre_gen_project.py", "hooks/post_gen_project.py"):
        imports = re.findall(r"^(?:import|from) (\w+)", (ROOT / name).read_text(), re.MULTILINE)
        assert set(imports) <= set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("include_example", "expected"), [(True, ALWAYS | EXAMPLE_ONLY), (False, ALWAYS)]
)
def test_each_option_has_exactly_these_files(
    bake: Bake, include_example: bool, expected: set[str]
) -> None:
    project = bake(include_example=include_example)
    assert set(tree(project)) == expected


@pytest.mark.parametrize("include_example", [True, False])
def test_nothing_is_left_to_render_or_to_remove(bake: Bake, include_example: bool) -> None:
    project = bake(include_example=include_example)
    for name, content in tree(project).items():
        text = content.decode()
        assert "cookiecutter" not in text.replace("cookiecutter.project_slug", ""), name
        if name.endswith(".md"):
            assert not JINJA.search(text), name
            assert "\n\n\n" not in text, name
        if not include_example:
            assert not re.search(
                r"# example$|<!-- example|example: (begin|end)", text, re.MULTILINE
            ), name
            assert "payment" not in text.lower(), name


def test_two_bakes_are_identical(bake: Bake) -> None:
    assert tree(bake("first")) == tree(bake("second"))


def test_a_bake_takes_less_than_two_seconds_of_its_own(bake: Bake) -> None:
    start = time.process_time()
    bake()
    assert time.process_time() - start < 2


def test_the_names_stand_where_they_are_needed(bake: Bake) -> None:
    project = bake(
        project_name="Order Desk", description='Says "no" \\ yes é', owner="Team <A & B>"
    )
    assert project.name == "order-desk"
    metadata = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    assert (metadata["name"], metadata["description"]) == ("order-desk", 'Says "no" \\ yes é')
    readme = (project / "README.md").read_text()
    assert readme.startswith('# Order Desk\n\nSays "no" \\ yes é\n\nOwner: Team <A & B>\n')
    assert 'service_name: ServiceName = "order-desk"' in (project / "app/settings.py").read_text()
    assert "\nSERVICE_NAME=order-desk\n" in (project / ".env.example").read_text()


@pytest.mark.parametrize("include_example", [True, False])
def test_what_is_baked_is_formatted_and_lint_clean(bake: Bake, include_example: bool) -> None:
    project = bake(include_example=include_example)
    for command in (["check", "--no-cache", "."], ["format", "--no-cache", "--check", "."]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command],
            cwd=project,
            stdout=subprocess.PIPE,
            check=False,
        )
        assert done.returncode == 0, done.stdout.decode()


def test_paths_are_legal_on_windows_and_short() -> None:
    for name in tracked():
        assert not re.search(r'[<>:"|?*\\]', name), name
        assert len(name) < 120, name


def test_lock_files_hold_hashes_and_no_addresses() -> None:
    for name in tracked():
        if Path(name).match("requirements*.txt"):
            text = (ROOT / name).read_text()
            assert "--hash=sha256:" in text
            assert not re.search(r"://|--(extra-)?index-url|--find-links", text), name


def code_lines(path: Path) -> int:
    """Count the lines that hold code: not blank, no comment, no docstring."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) and ast.get_docstring(node):
            docstrings.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    skipped = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    with path.open("rb") as file:
        tokens = [
            token
            for token in tokenize.tokenize(file.readline)
            if token.type not in {*skipped, tokenize.ENCODING}
        ]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    return len(lines - docstrings)


def test_a_pattern_is_short_and_knows_nothing_of_payments() -> None:
    files = [path for path in (ROOT / SOURCE / "app/patterns").iterdir() if path.suffix == ".py"]
    assert {path.stem for path in files} == {"__init__", *PATTERNS}
    assert {
        path.name: lines for path in files if (lines := len(path.read_text().splitlines())) >= 80
    } == {}
    assert [path.name for path in files if "payment" in path.read_text().lower()] == []


def test_the_example_is_read_in_ten_minutes() -> None:
    folder = ROOT / SOURCE / "app/payments"
    files = ("router", "service", "repository", "schemas", "consumer")
    assert sum(len((folder / f"{name}.py").read_text().splitlines()) for name in files) < 400


def test_the_app_without_the_example_can_be_read_in_twice_twenty_minutes(bake: Bake) -> None:
    folder = bake(include_example=False) / "app"
    for part in (APPLICATION, SERVER):
        assert sum(code_lines(folder / f"{name}.py") for name in part) < 900
    long = {path.name: len(path.read_text().splitlines()) for path in folder.rglob("*.py")}
    assert {name: lines for name, lines in long.items() if lines > 160} == {}
