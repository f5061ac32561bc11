"""Answers that cannot work are refused in one clear line each, and nothing is left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import JINJA_ALLOWED, SOURCE, Bake, tree

SLUG_RULE = (
    "takes lower-case letters, digits and single hyphens between them, and starts with a letter"
)
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
    ("project_slug", "s" * 41, f'"{"s" * 41}": has 41 characters; at most 40 fit'),
    ("project_slug", "s" * 70, f'"{"s" * 70}": has 70 characters; at most 40 fit'),
    ("project_slug", "con", '"con": is reserved; choose another name, such as my-con'),
    ("project_slug", "app", '"app": is reserved; choose another name, such as my-app'),
    ("project_slug", "fastapi", '"fastapi": is reserved; choose another name, such as my-fastapi'),
    ("project_name", "   ", '"   ": must not be empty'),
    ("project_name", "n" * 61, f'"{"n" * 61}": has 61 characters; at most 60 fit'),
    ("project_name", "a\nb", '"a\\nb": takes printable characters on one line'),
    ("description", "", '"": must not be empty'),
    ("description", "a\nimport os", '"a\\nimport os": takes printable characters on one line'),
    ("description", "a\x1b[31mb", '"a\\u001b[31mb": takes printable characters on one line'),
    ("description", "d" * 201, f'"{"d" * 77}...": has 201 characters; at most 200 fit'),
    ("owner", "a\u2028b", '"a\\u2028b": takes printable characters on one line'),
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
    command = [
        sys.executable,
        "-m",
        "cookiecutter",
        str(template),
        "--no-input",
        "--default-config",
        "-o",
        str(output),
    ]
    environment = os.environ | {"PYTHONUTF8": "1"}
    return subprocess.run(
        [*command, *answers], capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.parametrize(("name", "value", "line"), HOSTILE)
def test_an_answer_that_cannot_work_is_refused(
    template: Path, tmp_path: Path, name: str, value: str, line: str
) -> None:
    safe = [] if name == "project_slug" else ["project_slug=fine"]
    done = cookiecutter(template, tmp_path / "out", *safe, f"{name}={value}")
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == f"{name}={line}"
    left = [path.name for path in tmp_path.rglob("*") if path.name != "out"]
    assert left == []


def test_each_fault_has_its_line(template: Path, tmp_path: Path) -> None:
    done = cookiecutter(template, tmp_path, "project_slug=App_", "description=", "owner=a\tb")
    lines = [line.split(":")[0] for line in done.stderr.splitlines()[:3]]
    assert lines == ['project_slug="App_"', 'description=""', 'owner="a\\tb"']


@pytest.mark.parametrize("text", HARMLESS)
def test_odd_texts_are_data(template: Path, tmp_path: Path, text: str) -> None:
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
    check = "import tomllib, sys; print(tomllib.load(open('pyproject.toml', 'rb'))['project']['description'])"
    shown = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", check],
        cwd=tmp_path / "fine",
        stdout=subprocess.PIPE,
        check=True,
    )
    assert shown.stdout.decode().strip() == text.strip()
    assert list(tmp_path.rglob("hacked")) == []


@pytest.mark.parametrize(
    ("name", "slug"),
    [("Zahlungen für Müller", "zahlungen-fur-muller"), ("  Order   Desk! ", "order-desk")],
)
def test_the_name_for_machines_follows_from_the_name(bake: Bake, name: str, slug: str) -> None:
    assert bake(project_name=name).name == slug


def test_who_refuses_hooks_still_gets_the_neutral_project(bake: Bake, template: Path) -> None:
    baked, raw = tree(bake(accept_hooks=False)), tree(template / SOURCE)
    rendered = {name for name in raw if JINJA_ALLOWED.fullmatch(f"{SOURCE}/{name}")}
    assert baked.keys() == raw.keys()
    assert {name for name in raw if baked[name] != raw[name]} <= rendered


def test_the_post_hook_may_run_twice(bake: Bake, template: Path, tmp_path: Path) -> None:
    project = bake(project_slug="orders", include_example=False)
    before = tree(project)
    hook = (template / "hooks/post_gen_project.py").read_text()
    answers = '{"project_slug": "orders", "description": "A production FastAPI service.", "include_example": true}'
    script = tmp_path / "again.py"
    script.write_text(hook.replace("{{ cookiecutter | tojson }}", answers))
    subprocess.run(
        [sys.executable, str(script)], cwd=project, check=True, stdout=subprocess.DEVNULL
    )
    assert tree(project) == before
