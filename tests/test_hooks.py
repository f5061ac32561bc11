"""Hooks reject invalid answers with one line each, and leave no files behind."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import JINJA_ALLOWED, SOURCE, Bake, tree

SLUG_RULE = "must be lower-case letters, digits and single hyphens, starting with a letter"
ONE_LINE = "must be one line of printable characters"
HOSTILE = [
    ("project_slug", "", '"": must not be empty'),
    ("project_slug", "   ", '"   ": must not be empty'),
    ("project_slug", "1st-service", f'"1st-service": {SLUG_RULE}'),
    ("project_slug", "Orders", f'"Orders": {SLUG_RULE}'),
    ("project_slug", "order_desk", f'"order_desk": {SLUG_RULE}'),
    ("project_slug", "a--b", f'"a--b": {SLUG_RULE}'),
    ("project_slug", "a-", f'"a-": {SLUG_RULE}'),
    ("project_slug", "a b", f'"a b": {SLUG_RULE}'),
    ("project_slug", "a.b", f'"a.b": {SLUG_RULE}'),
    ("project_slug", "zoë", f'"zo\\u00eb": {SLUG_RULE}'),
    ("project_slug", "x;touch hacked", f'"x;touch hacked": {SLUG_RULE}'),
    ("project_slug", 'x"y', f'"x\\"y": {SLUG_RULE}'),
    ("project_slug", "x'y", f'"x\'y": {SLUG_RULE}'),
    ("project_slug", "x\\y", f'"x\\\\y": {SLUG_RULE}'),
    ("project_slug", "s" * 41, f'"{"s" * 41}": must be at most 40 characters, but has 41'),
    ("project_slug", "s" * 70, f'"{"s" * 70}": must be at most 40 characters, but has 70'),
    ("project_slug", "con", '"con": is reserved; choose another name, for example my-con'),
    ("project_slug", "app", '"app": is reserved; choose another name, for example my-app'),
    (
        "project_slug",
        "fastapi",
        '"fastapi": is reserved; choose another name, for example my-fastapi',
    ),
    ("project_name", "   ", '"   ": must not be empty'),
    ("project_name", "n" * 61, f'"{"n" * 61}": must be at most 60 characters, but has 61'),
    ("project_name", "a\nb", f'"a\\nb": {ONE_LINE}'),
    ("description", "", '"": must not be empty'),
    ("description", "a\nimport os", f'"a\\nimport os": {ONE_LINE}'),
    ("description", "a\x1b[31mb", f'"a\\u001b[31mb": {ONE_LINE}'),
    ("description", "d" * 201, f'"{"d" * 77}...": must be at most 200 characters, but has 201'),
    ("owner", "a\u2028b", f'"a\\u2028b": {ONE_LINE}'),
]
HARMLESS = [
    '"""; import os; os.system("touch hacked") #',
    "'''+str(1)+'''",
    "back\\slash \\n \\u0041 \\",
    "quotes \" and ' and `touch hacked`",
    "$(touch hacked) ${HOME} %s %(x)s",
    "Zahlungen für Müller, 東京 💶",
    "</script><b>",
]


def cookiecutter(template: Path, output: Path, *answers: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cookiecutter", str(template), "--no-input"]
    options = ["--default-config", "--output-dir", str(output)]
    environment = os.environ | {"PYTHONUTF8": "1"}
    return subprocess.run(
        [*command, *options, *answers], capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.parametrize(("name", "value", "line"), HOSTILE)
def test_invalid_answers_are_rejected_and_leave_no_files(
    template: Path, tmp_path: Path, name: str, value: str, line: str
) -> None:
    safe = [] if name == "project_slug" else ["project_slug=fine"]
    done = cookiecutter(template, tmp_path / "out", *safe, f"{name}={value}")
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == f"{name}={line}"
    left = [path.name for path in tmp_path.rglob("*") if path.name != "out"]
    assert left == []


def test_each_invalid_answer_gets_one_line(template: Path, tmp_path: Path) -> None:
    done = cookiecutter(template, tmp_path, "project_slug=App_", "description=", "owner=a\tb")
    lines = [line.split(":")[0] for line in done.stderr.splitlines()[:3]]
    assert lines == ['project_slug="App_"', 'description=""', 'owner="a\\tb"']


@pytest.mark.parametrize("text", HARMLESS)
def test_special_characters_are_kept_and_never_executed(
    template: Path, tmp_path: Path, text: str
) -> None:
    done = cookiecutter(
        template,
        tmp_path,
        "project_slug=fine",
        f"project_name={text[:60]}",
        f"description={text}",
        f"owner={text}",
    )
    assert done.returncode == 0, done.stderr
    assert text in (tmp_path / "fine/README.md").read_text(encoding="utf-8")
    metadata = tomllib.loads((tmp_path / "fine/pyproject.toml").read_text(encoding="utf-8"))
    assert metadata["project"]["description"] == text
    assert list(tmp_path.rglob("hacked")) == []


@pytest.mark.parametrize(
    ("name", "slug"),
    [("Zahlungen für Müller", "zahlungen-fur-muller"), ("  Order   Desk! ", "order-desk")],
)
def test_the_slug_defaults_to_the_slugified_project_name(bake: Bake, name: str, slug: str) -> None:
    assert bake(project_name=name).name == slug


def test_without_hooks_the_project_equals_the_template(bake: Bake, template: Path) -> None:
    """`--accept-hooks no` changes only the rendered files: the service keeps its neutral name."""
    baked = tree(bake(accept_hooks=False))
    raw = tree(template / SOURCE)
    rendered = {name for name in raw if JINJA_ALLOWED.fullmatch(f"{SOURCE}/{name}")}
    assert baked.keys() == raw.keys()
    assert {name for name in raw if baked[name] != raw[name]} <= rendered


def test_a_second_run_of_the_post_hook_changes_nothing(
    bake: Bake, template: Path, tmp_path: Path
) -> None:
    project = bake(project_slug="orders", include_example=False)
    before = tree(project)
    hook = (template / "hooks/post_gen_project.py").read_text()
    answers = {
        "project_slug": "orders",
        "description": "A production FastAPI service.",
        "include_example": False,
        "include_jobs": False,
    }
    script = tmp_path / "again.py"
    script.write_text(hook.replace("{{ cookiecutter | tojson }}", json.dumps(answers)))
    command = [sys.executable, str(script)]
    subprocess.run(command, cwd=project, check=True, stdout=subprocess.DEVNULL)
    assert tree(project) == before
