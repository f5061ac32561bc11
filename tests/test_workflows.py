"""The generated project's workflows: static checks, and runs of their commands."""

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
from tests.projects import environment

GITHUB = ROOT / SOURCE / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").iterdir())
DIGEST = "sha256:" + "1" * 64


def jobs(workflow: Path) -> dict[str, dict[str, Any]]:
    """Return the jobs of a workflow."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(workflow.read_text())["jobs"]
    return found


def script_with(text: str, workflow: str, job: str) -> str:
    """Return the only script of a job that contains a text."""
    steps = jobs(GITHUB / "workflows" / workflow)[job]["steps"]
    (script,) = [step["run"] for step in steps if text in step.get("run", "")]
    return str(script)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_commit_with_a_version_comment(workflow: Path) -> None:
    used = re.findall(r"uses: (.*)", workflow.read_text())
    assert used
    pinned = r"actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+"
    own = r"\$/\.github/workflows/ci\.yml.*"
    for action in used:
        assert re.fullmatch(f"{pinned}|{own}", action)


def test_each_action_has_one_commit_in_all_workflows() -> None:
    used = {
        line
        for workflow in WORKFLOWS
        for line in re.findall(r"uses: (actions/.*)", workflow.read_text())
    }
    assert len(used) == len({line.split("@")[0] for line in used})


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_jobs_have_least_permissions_and_a_timeout(workflow: Path) -> None:
    assert yaml.safe_load(workflow.read_text())["permissions"] == {}
    allowed: list[dict[str, str]] = [{}]
    if workflow.name == "release.yml":
        allowed.append({"packages": "write"})
    for name, job in jobs(workflow).items():
        assert job["permissions"].pop("contents") == "read", name
        assert job["permissions"] in allowed, name
        assert "uses" in job or job["timeout-minutes"] <= 20, name


def test_workflows_run_existing_make_targets() -> None:
    makefile = (ROOT / SOURCE / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
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
    assert {"lint", "types", "test-all", "image", "k8s-check"} <= made <= targets


def test_scripts_contain_no_expression() -> None:
    """A pull request could inject commands through them.

    GitHub pastes the value of an expression into the script.
    """
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


def run(
    command: str, directory: Path, variables: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a script of a workflow as GitHub's runner does, with these variables only."""
    return subprocess.run(
        ["bash", "-ec", command],
        cwd=directory,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_manifests_job_passes_and_rejects_an_unknown_field(bake: Bake) -> None:
    project = bake(project_slug="orders")
    steps = jobs(GITHUB / "workflows/ci.yml")["manifests"]["steps"]
    (command,) = [step["run"] for step in steps if "run" in step]
    variables = environment(PYTHON=interpreter("3.13"))
    done = run(command, project, variables)
    assert done.returncode == 0, done.stdout + done.stderr

    broken = project / "deploy/k8s/base/deployment.yaml"
    broken.write_text(broken.read_text().replace("minReadySeconds:", "minReadySecond:"))
    done = run(command, project, variables)
    assert done.returncode != 0
    assert "'minReadySecond' was unexpected" in done.stdout


def test_commands_in_the_release_summary_deploy_its_image(bake: Bake, tmp_path: Path) -> None:
    if not shutil.which("kustomize"):
        missing("kustomize")
    project = bake(project_slug="orders")
    provenance = {"materials": [{"digest": {"sha256": "2" * 64}}]}
    built = {"buildx.build.provenance": provenance, "containerimage.digest": DIGEST}
    (tmp_path / "image.json").write_text(json.dumps(built))
    summary = tmp_path / "summary"
    variables = {
        "GITHUB_REPOSITORY": "Team/Orders",
        "GITHUB_REF_NAME": "v1.2.3",
        "GITHUB_STEP_SUMMARY": str(summary),
        "RUNNER_TEMP": str(tmp_path),
        "PATH": os.environ["PATH"],
    }
    done = run(script_with("$GITHUB_STEP_SUMMARY", "release.yml", "image"), project, variables)
    assert done.returncode == 0, done.stderr
    assert summary.read_text() == done.stdout
    subprocess.run(["bash", "-ec", done.stdout], cwd=project, check=True)
    manifests = render(project / "deploy/k8s/overlays/prod")
    assert re.findall(r"image: (.*)", manifests) == [f"ghcr.io/team/orders:1.2.3@{DIGEST}"] * 2
