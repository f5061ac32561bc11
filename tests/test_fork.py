"""A fork of the template, made by the steps of docs/forking.md, passes the fast tests.

Tests that generate projects, from a list of answers or of edits, run with both ends of the list:
what a fork changes rarely breaks only an entry in between. Those of files run with all files.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import FORK_LISTS, ROOT, SOURCE, Bake, tracked
from tests.test_cruft import make_repository, replace

#: Files of the fork, which the template never has.
OWN_FILES = {
    f"{SOURCE}/house/make.mk": (
        "export INDEX_URL := https://packages.acme.example/simple\n"
        "export BASE_IMAGE := registry.acme.example/python:3.13\n"
    ),
    f"{SOURCE}/house/ca.pem": ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
    f"{SOURCE}/house/kustomization.yaml": """\
apiVersion: kustomize.config.k8s.io/v1alpha1
kind: Component
labels:
  - includeTemplates: true
    pairs:
      acme.example/cost-center: "{{ cookiecutter.cost_center }}"
configMapGenerator:
  - name: "{{ cookiecutter.project_slug }}-config"
    behavior: merge
    literals:
      - LOG_FIELDS=cost_center={{ cookiecutter.cost_center }}
      - METRICS_PREFIX=acme_
""",
    f"{SOURCE}/SUPPORT.md": "# Support\n\nAsk the platform team of Acme.\n",
    f"{SOURCE}/app/authentication.py": '''\
"""The login of Acme: a dependency of every route."""

from fastapi import Request


def authenticate(request: Request) -> None:
    """Set the caller."""
    request.state.principal = request.headers.get("X-Acme-User", "")
''',
    f"{SOURCE}/tests/house/__init__.py": "",
    f"{SOURCE}/tests/house/test_authentication.py": '''\
"""The login of Acme."""

from fastapi import Request

from app.authentication import authenticate


def test_caller_is_the_principal() -> None:
    scope = {"type": "http", "headers": [(b"x-acme-user", b"ada")]}
    request = Request(scope)
    authenticate(request)
    assert request.state.principal == "ada"
''',
    "tests/house/__init__.py": "",
    "tests/house/lists.toml": 'modules = ["authentication.py"]\n',
    "tests/house/test_acme.py": '''\
"""The rules of Acme for generated projects."""

from tests.conftest import Bake, render


def test_pods_have_the_cost_center(bake: Bake) -> None:
    project = bake(cost_center="4711")
    manifests = render(project / "deploy/k8s/overlays/prod")
    assert manifests.count("acme.example/cost-center: \\"4711\\"") > 5
    assert "LOG_FIELDS: cost_center=4711" in manifests
''',
}
#: The index of the fork does not exist. Variables on make's command line override house/make.mk.
WITHOUT_INDEX = "INDEX_URL= CA_FILE="
#: Lines of the template that the fork changes.
EDITS = [
    ("cookiecutter.json", '"project_name": "My Service"', '"project_name": "Acme Service"'),
    (
        "cookiecutter.json",
        '  "__prompts__": {\n',
        '  "cost_center": "1000",\n  "__prompts__": {\n    "cost_center": "Cost center",\n',
    ),
    ("README.md", "# Production FastAPI template\n", "# The service template of Acme\n"),
    ("README.md", "| `project_name` | My Service |", "| `project_name` | Acme Service |"),
    (
        "README.md",
        "The slug consists of",
        "| `cost_center` | 1000 | four digits |\n\nThe slug consists of",
    ),
    ("pyproject.toml", 'name = "fastapi-production-template"', 'name = "acme-template"'),
    (
        f"{SOURCE}/app/main.py",
        "app = create_app(load_settings())\n",
        "app = create_app(load_settings(), dependencies=[Depends(authenticate)])\n",
    ),
    (
        f"{SOURCE}/app/main.py",
        "from app import lifecycle\n",
        "from app import lifecycle\nfrom app.authentication import authenticate\n",
    ),
    (
        f"{SOURCE}/README.md",
        "├── tasks.py          background",
        "├── authentication.py the login of Acme\n├── tasks.py          background",
    ),
    (
        f"{SOURCE}/app/__init__.py",
        "tasks.py             background",
        "authentication.py    the login of Acme\ntasks.py             background",
    ),
    (f"{SOURCE}/pyproject.toml", '    "web | storage', '    "authentication",\n    "web | storage'),
    *(
        (
            f"{SOURCE}/deploy/k8s/overlays/{overlay}/kustomization.yaml",
            "resources:\n  - ../../base\n",
            "resources:\n  - ../../base\ncomponents:\n  - ../../../../house\n",
        )
        for overlay in ("dev", "staging", "prod")
    ),
]


@pytest.fixture
def fork(template: Path, tmp_path: Path) -> Path:
    """A repository of the template with an organization's changes."""
    fork = shutil.copytree(template, tmp_path / "fork")
    for name, text in OWN_FILES.items():
        path = fork / name
        assert not path.exists(), f"{name} is the fork's"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name, before, after in EDITS:
        replace(fork / name, before, after)
    make_repository(fork)
    return fork


@pytest.mark.slow
def test_fork_passes_the_fast_tests(fork: Path) -> None:
    options = ["-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "not slow", "--ends-of-lists", *options],
        cwd=fork,
        env=os.environ | {"GNUMAKEFLAGS": WITHOUT_INDEX},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:]


def test_guide_lists_every_file_that_the_fork_changes() -> None:
    text = (ROOT / "docs/forking.md").read_text()
    changed = [name for name, _, _ in EDITS]
    house = [name for name in OWN_FILES if "house" in Path(name).parts]
    for name in [*changed, *house]:
        short = name.replace(SOURCE, "SERVICE").replace("__init__.py", "")
        overlay = re.sub("overlays/[a-z]+/", "overlays/*/", short)
        directory = f"{Path(short).parent.as_posix()}/"
        assert f"`{overlay}`" in text or short in text or f"`{directory}`" in text, name


def test_template_has_no_house_files() -> None:
    """Files of forks are named so. A fork has the list of the tests."""
    if not FORK_LISTS.exists():
        assert [name for name in tracked() if "house" in Path(name).parts] == []


def test_nothing_else_imports_the_files_of_kubernetes(bake: Bake) -> None:
    """The command of the guide deletes them in a project."""
    text = (ROOT / "docs/forking.md").read_text()
    commands = re.findall(r"`git rm (?:-r )?([^`]*)`", text)
    project = bake()
    deleted = [project / name for command in commands for name in command.split()]
    for path in deleted:
        assert path.exists(), path
    for path in project.rglob("*.py"):
        if not any(path.is_relative_to(each) for each in deleted):
            assert not re.search(r"(from|import) tests\.deploy", path.read_text()), path
