"""The generated project's CI: what can be said of it without GitHub, and its commands run where they can be."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, SOURCE, Bake, interpreter, missing, render

GITHUB = ROOT / SOURCE / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").iterdir())
DIGEST = "sha256:" + "1" * 64


def jobs(workflow: Path) -> dict[str, dict[str, Any]]:
    """Return the jobs of a workflow."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(workflow.read_text())["jobs"]
    return found


def step(workflow: str, job: str, name: str) -> str:
    """Return the script of a step."""
    steps = jobs(GITHUB / "workflows" / workflow)[job]["steps"]
    (script,) = [step["run"] for step in steps if step.get("name") == name]
    return str(script)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_commit_with_their_version_beside(workflow: Path) -> None:
    used = re.findall(r"uses: (.*)", workflow.read_text())
    assert used
    for action in used:
        assert re.fullmatch(
            r"actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+|\$/\.github/workflows/ci\.yml.*", action
        )


def test_an_action_has_one_commit_everywhere() -> None:
    used = {
        line
        for workflow in WORKFLOWS
        for line in re.findall(r"uses: (actions/.*)", workflow.read_text())
    }
    assert len(used) == len({line.split("@")[0] for line in used})


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_job_may_what_it_says_for_as_long_as_it_says(workflow: Path) -> None:
    assert yaml.safe_load(workflow.read_text())["permissions"] == {}
    for name, job in jobs(workflow).items():
        assert job["permissions"].pop("contents") == "read", name
        assert job["permissions"] in (
            {},
            {"packages": "write"} if workflow.name == "release.yml" else {},
        ), name
        assert "uses" in job or job["timeout-minutes"] <= 20, name


def test_workflows_run_make_targets_that_there_are() -> None:
    targets = set(
        re.findall(r"^([a-z0-9-]+):", (ROOT / SOURCE / "Makefile").read_text(), re.MULTILINE)
    )
    steps = [
        step
        for workflow in WORKFLOWS
        for job in jobs(workflow).values()
        for step in job.get("steps", [])
    ]
    made = {
        target
        for step in steps
        for line in re.findall(r"^make (.*)", step.get("run", ""))
        for target in line.split()
    }
    assert {"lint", "types", "test", "image", "k8s-check"} <= made <= targets


def test_no_expression_is_pasted_into_a_script() -> None:
    """What GitHub puts into a script, whoever opens a pull request may have written."""
    for workflow in WORKFLOWS:
        for job in jobs(workflow).values():
            assert not [step for step in job.get("steps", []) if "${{" in step.get("run", "")]


def test_every_update_waits_a_week() -> None:
    updates = yaml.safe_load((GITHUB / "dependabot.yml").read_text())["updates"]
    assert {update["package-ecosystem"] for update in updates} == {
        "github-actions",
        "docker",
        "docker-compose",
        "pip",
    }
    assert all(update["cooldown"] == {"default-days": 7} for update in updates)


@pytest.mark.slow
def test_the_manifests_job_passes_in_a_project(bake: Bake, tmp_path: Path) -> None:
    project = bake(project_slug="orders")
    (command,) = [
        step["run"]
        for step in jobs(GITHUB / "workflows/ci.yml")["manifests"]["steps"]
        if "run" in step
    ]
    tools = Path(os.environ.get("TOOLS", ROOT / ".tools")).resolve()
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in {"MAKEFLAGS", "MFLAGS", "VENV"}
    }
    environment |= {"PYTHON": interpreter("3.13"), "TOOLS": str(tools)}
    done = subprocess.run(
        ["bash", "-ec", command], cwd=project, env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr).decode()
    broken = project / "deploy/k8s/base/deployment.yaml"
    broken.write_text(broken.read_text().replace("minReadySeconds:", "minReadySecond:"))
    done = subprocess.run(
        ["bash", "-ec", command], cwd=project, env=environment, capture_output=True, check=False
    )
    assert done.returncode != 0
    assert b"'minReadySecond' was unexpected" in done.stdout


def test_what_a_release_prints_deploys_its_image(bake: Bake, tmp_path: Path) -> None:
    if not shutil.which("kustomize"):
        missing("kustomize")
    project = bake(project_slug="orders")
    base = {"materials": [{"digest": {"sha256": "2" * 64}}]}
    (tmp_path / "image.json").write_text(
        json.dumps({"buildx.build.provenance": base, "containerimage.digest": DIGEST})
    )
    github = {
        "GITHUB_REPOSITORY": "Team/Orders",
        "GITHUB_REF_NAME": "v1.2.3",
        "RUNNER_TEMP": str(tmp_path),
    }
    github |= {"GITHUB_STEP_SUMMARY": str(tmp_path / "summary"), "PATH": os.environ["PATH"]}
    script = step("release.yml", "image", "tell how to deploy it")
    done = subprocess.run(
        ["bash", "-ec", script], cwd=project, env=github, stdout=subprocess.PIPE, check=True
    )
    assert (tmp_path / "summary").read_bytes() == done.stdout
    subprocess.run(["bash", "-ec", done.stdout.decode()], cwd=project, check=True)
    manifests = render(project / "deploy/k8s/overlays/prod")
    assert re.findall(r"image: (.*)", manifests) == [f"ghcr.io/team/orders:1.2.3@{DIGEST}"] * 2
