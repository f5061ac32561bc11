"""The template source: valid as it is, and complete when baked."""

import ast
import json
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.conftest import FORK, JINJA_ALLOWED, ROOT, SOURCE, Bake, bake_to, tracked, tree
from tests.parts import ALL_PARTS, COMBINATIONS, Parts, bake_parts, parts_id, service_files, table

JINJA = re.compile(r"{{|{%|{#")
ANSWERS = "{{ cookiecutter | tojson }}"


def sources() -> list[str]:
    """Return the tracked files that cookiecutter reads."""
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


def test_jinja_is_only_in_allowed_files() -> None:
    others = [
        name
        for name in sources()
        if not JINJA_ALLOWED.fullmatch(name)
        and name.endswith((".toml", ".txt", "Makefile", ".example", ".ini", ".yaml"))
        if JINJA.search((ROOT / name).read_text())
    ]
    assert others == []
    for name in sources():
        if name.endswith(".yml"):  # what GitHub fills in has a dollar sign before it
            assert not JINJA.search((ROOT / name).read_text().replace("${{", "")), name


def test_python_files_are_copied_unrendered() -> None:
    """Braces in them are Python's; cookiecutter copies the files as they are.

    A file of another type, which a fork adds, is rendered. Without Jinja that changes nothing.
    """
    patterns = json.loads((ROOT / "cookiecutter.json").read_text())["_copy_without_render"]
    rendered = [
        name for name in sources() if name.startswith(SOURCE) and JINJA_ALLOWED.fullmatch(name)
    ]
    copied = [
        name for name in sources() if name.startswith(SOURCE) and not JINJA_ALLOWED.fullmatch(name)
    ]
    others = [name for name in copied if not any(Path(name).match(each) for each in patterns)]
    assert [name for name in others if JINJA.search((ROOT / name).read_text())] == []
    assert not [name for name in others if name.endswith((".py", ".yml", ".toml", "Makefile"))]
    assert not any(Path(name).match(pattern) for name in rendered for pattern in patterns)


def test_hooks_read_answers_as_data_in_one_place() -> None:
    for name in ("hooks/pre_gen_project.py", "hooks/post_gen_project.py"):
        text = (ROOT / name).read_text()
        assert text.count(ANSWERS) == 1
        assert not JINJA.search(text.replace(ANSWERS, ""))


def test_hooks_import_only_the_standard_library() -> None:
    for name in ("hooks/pre_gen_project.py", "hooks/post_gen_project.py"):
        imports = re.findall(r"^(?:import|from) (\w+)", (ROOT / name).read_text(), re.MULTILINE)
        assert set(imports) <= set(sys.stdlib_module_names)


def test_bake_with_all_parts_has_every_file_of_the_template(bake: Bake) -> None:
    assert set(tree(bake_parts(bake, ALL_PARTS))) == set(service_files())


def test_default_answers_give_the_example_without_jobs(bake: Bake) -> None:
    """The answers of services from before the question: an update changes nothing in them."""
    assert tree(bake("default")) == tree(bake_parts(bake, ("example",)))


@pytest.mark.parametrize("parts", COMBINATIONS, ids=parts_id)
def test_bake_without_a_part_lacks_exactly_its_files(bake: Bake, parts: Parts) -> None:
    """The patterns are in docs/patterns then, where `make pattern` finds them."""
    gone = [table(name) for name in ALL_PARTS if name not in parts]
    lacking = {path for each in gone for path in [*each["PATHS"], *each["DEPENDENTS"]]}
    moved = {name for each in gone for name in each["PATHS"] if name.startswith(each["MOVED"])}
    assert ("app/patterns/outbox.py" in moved) == ("example" not in parts)
    lacking |= {f"scripts/parts/{name}.py" for name in ALL_PARTS if name not in parts}
    if not parts:
        lacking.add("scripts/remove_part.py")
    kept = {f"docs/patterns/{name}" for name in moved}
    assert set(tree(bake_parts(bake, parts))) == (set(service_files()) - lacking) | kept


@pytest.mark.parametrize("parts", COMBINATIONS, ids=parts_id)
def test_app_docstring_lists_every_module(bake: Bake, parts: Parts) -> None:
    app = bake_parts(bake, parts) / "app"
    listed = ast.get_docstring(ast.parse((app / "__init__.py").read_text())) or ""
    modules = {path.name for path in app.rglob("*.py")} - {"__init__.py", "__main__.py"}
    assert set(re.findall(r"\w+\.py", listed)) == modules
    folders = {path.name for path in app.iterdir() if path.is_dir()} - {"__pycache__"}
    assert set(re.findall(r"^(\w+)/", listed, re.MULTILINE)) == folders


def test_top_level_of_app_is_what_a_team_edits() -> None:
    names = {path.name for path in (ROOT / SOURCE / "app").glob("*.py")} - {"__init__.py"}
    edited = {"main.py", "lifespan.py", "settings.py", "errors.py"}
    assert names == edited | {
        "tasks.py",
        "process.py",
        "jobs_main.py",
        "lifecycle.py",
        "setting_types.py",
        *FORK.get("modules", []),
    }


@pytest.mark.parametrize("parts", COMBINATIONS, ids=parts_id)
def test_bake_leaves_no_jinja(bake: Bake, parts: Parts) -> None:
    """That it leaves no mark of a part that it lacks is tested in test_parts.py."""
    project = bake_parts(bake, parts)
    for name, content in tree(project).items():
        text = content.decode()
        assert "cookiecutter" not in text.replace("cookiecutter.project_slug", ""), name
        if name.endswith(".md"):
            assert not JINJA.search(text), name
            # two blank lines in a row only within code
            without_code = re.sub(r"^```.*?^```", "code", text, flags=re.DOTALL | re.MULTILINE)
            assert not re.search(r"\n\n\n(?! )", without_code), name


def test_two_bakes_are_identical(template: Path, tmp_path: Path) -> None:
    first = bake_to(template, tmp_path / "first")
    second = bake_to(template, tmp_path / "second")
    assert tree(first) == tree(second)


def test_bake_uses_less_than_two_seconds_of_cpu(template: Path, tmp_path: Path) -> None:
    start = time.process_time()
    bake_to(template, tmp_path)
    assert time.process_time() - start < 2


def test_answers_reach_every_file_that_needs_them(bake: Bake) -> None:
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


@pytest.mark.parametrize("parts", COMBINATIONS, ids=parts_id)
def test_bake_is_formatted_and_lint_clean(bake: Bake, parts: Parts) -> None:
    project = bake_parts(bake, parts)
    for command in (["check", "--no-cache", "."], ["format", "--no-cache", "--check", "."]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command],
            cwd=project,
            stdout=subprocess.PIPE,
            check=False,
        )
        assert done.returncode == 0, done.stdout.decode()


def test_checkout_with_line_ends_of_windows_has_those_of_unix(bake: Bake) -> None:
    """`core.autocrlf=true` is the default of Git for Windows; sh and make read no CRLF."""
    project = bake()
    before = tree(project)
    git = ["git", "-c", "core.autocrlf=true", "-c", "user.name=a", "-c", "user.email=a@b"]
    commands = [
        ["init", "--quiet"],
        ["add", "."],
        ["commit", "--quiet", "--message", "a"],
        ["rm", "-r", "--quiet", "."],
        ["checkout", "--quiet", "HEAD", "--", "."],
    ]
    for command in commands:
        subprocess.run([*git, *command], cwd=project, check=True, capture_output=True)
    after = {name: text for name, text in tree(project).items() if not name.startswith(".git/")}
    assert after == before


def test_commands_of_development_replace_their_shell() -> None:
    """They end with their parent: make, which an editor's stop button kills, not a shell."""
    makefile = (ROOT / SOURCE / "Makefile").read_text()
    starts = re.findall(r"^.*-m scripts\.dev(?:_environment)?$", makefile, re.MULTILINE)
    assert len(starts) == 2
    for line in starts:
        # `$$PPID` is the pid of make, even if make ends before the command reads it.
        assert re.search(r"(@|:= )exec env DEV_PARENT=\$\$PPID \$\(ENV\) ", line), line


def test_tools_and_data_are_not_linted_without_git(bake: Bake) -> None:
    """`make setup` installs uv in `.tools`. Ruff reads `.gitignore` only in a git repository."""
    project = bake()
    for name in (".tools/uv", ".dev", ".venv/lib"):
        (project / name).mkdir(parents=True)
        (project / name / "unclean.py").write_text("import os,sys\n")
    for command in (["check", "--no-cache", "."], ["format", "--no-cache", "--check", "."]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command],
            cwd=project,
            stdout=subprocess.PIPE,
            check=False,
        )
        assert done.returncode == 0, done.stdout.decode()


def test_paths_are_short_and_legal_on_windows() -> None:
    for name in tracked():
        assert not re.search(r'[<>:"|?*\\]', name), name
        assert len(name) < 120, name


def test_lock_files_have_hashes_and_no_addresses() -> None:
    for name in tracked():
        if Path(name).match("requirements*.txt"):
            text = (ROOT / name).read_text()
            assert "--hash=sha256:" in text
            assert not re.search(r"://|--(extra-)?index-url|--find-links", text), name
