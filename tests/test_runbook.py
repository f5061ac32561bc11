"""The runbook of the generated project: its commands exist, and its rollout does first what has to be first."""

import os
import re
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api_server import ApiServer
from tests.conftest import Bake, missing

#: The stand-in has no schemas to validate with, and reads no protobuf, in which `create secret` talks.
WRAPPER = """#!/bin/sh
case "$1 $2 $*" in
*--dry-run*|*--help) ;;
"create secret "*) KUBECTL "$@" --dry-run=client --output=yaml | KUBECTL create --validate=false -f -; exit;;
apply*|replace*) verb=$1; shift; set -- "$verb" --validate=false "$@";;
esac
exec KUBECTL "$@"
"""
BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)
HEADING = re.compile(r"^## (.+)$", re.MULTILINE)


class Runbook:
    """The commands of a baked runbook, by heading, for a shell whose kubectl talks to a stand-in."""

    def __init__(self, project: Path, folder: Path) -> None:
        self.project, self.folder = project, folder
        self.text = (project / "docs/runbook.md").read_text()
        parts = zip(["", *HEADING.findall(self.text)], HEADING.split(self.text)[::2], strict=True)
        self.blocks = {
            name: [textwrap.dedent(block) for block in BLOCK.findall(part)] for name, part in parts
        }

    def run(self, server: ApiServer, *blocks: str) -> subprocess.CompletedProcess[str]:
        """Run blocks in one shell that ends at the first command that fails."""
        kubectl = self.folder / "bin/kubectl"
        if not kubectl.exists():
            kubectl.parent.mkdir()
            kubectl.write_text(WRAPPER.replace("KUBECTL", str(shutil.which("kubectl"))))
            editor = self.folder / "bin/editor"
            editor.write_text(
                '#!/bin/sh\nfor file; do echo "postgresql://app@postgres/app" > "$file"; done\n'
            )
            for program in (kubectl, editor):
                program.chmod(0o755)
        environment = os.environ | {
            "PATH": f"{kubectl.parent}:{os.environ['PATH']}",
            "KUBECONFIG": str(self.folder / "config"),
            "HOME": str(self.folder),
            "EDITOR": str(self.folder / "bin/editor"),
            "TMPDIR": str(self.folder),
        }
        cluster = (
            f"kubectl config set-cluster it --server=http://127.0.0.1:{server.server_port}\n"
            "kubectl config set-context it --cluster=it\nkubectl config use-context it\n"
        )
        script = cluster + "".join([*self.blocks[""], *blocks])
        command = ["bash", "-euo", "pipefail", "-c", script]
        return subprocess.run(
            command, cwd=self.project, env=environment, capture_output=True, text=True, check=False
        )


@pytest.fixture
def runbook(bake: Bake, tmp_path: Path) -> Runbook:
    if not shutil.which("kubectl"):
        missing("kubectl")
    folder = tmp_path / "home"
    folder.mkdir()
    return Runbook(bake(), folder)


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as server:
        server.objects["/api/v1/namespaces/ingress"] = {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": "ingress"},
        }
        yield server
        server.shutdown()


def test_every_command_of_kubectl_exists_with_its_options(runbook: Runbook) -> None:
    blocks = "".join(block for found in runbook.blocks.values() for block in found)
    commands = [
        command.strip() for line in blocks.splitlines() for command in re.split(r"[|]|&&", line)
    ]
    own = [command.split(">")[0] for command in commands if command.startswith("kubectl ")]
    assert len(own) > 20
    for command in own:
        script = f"NAME=name OVERLAY=prod RENDERED=file SECRETS=folder; {command} --help"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr)


def test_its_links_lead_somewhere(runbook: Runbook) -> None:
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", name.lower()).replace(" ", "-")
        for name in HEADING.findall(runbook.text)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", runbook.text)) <= anchors
    for name in re.findall(r"`(deploy/[\w/.-]+)`", runbook.text):
        assert (runbook.project / name).exists(), name


@pytest.mark.slow
def test_a_first_deploy_ends_with_all_pods_ready_and_a_second_runs_a_migration_of_its_own(
    runbook: Runbook, server: ApiServer
) -> None:
    render, secret, label, _, wait = runbook.blocks["First deploy"]
    _, migrate, rollout = runbook.blocks["Rollout"]
    first = runbook.run(server, render, secret, label, migrate, rollout, wait)
    assert first.returncode == 0, first.stderr
    for words in (
        "secret/my-service-secrets created",
        "namespace/ingress labeled",
        "successfully rolled out",
    ):
        assert words in first.stdout
    at = server.done.index
    assert at("POST namespaces/my-service-prod") < at("POST secrets/my-service-secrets")
    assert at("POST networkpolicies/my-service") < at("POST jobs/my-service-migrate")
    assert (
        at("POST secrets/my-service-secrets")
        < at("POST jobs/my-service-migrate")
        < at("POST deployments/my-service")
    )
    assert not list(runbook.folder.rglob("database_url"))

    base = runbook.project / "deploy/k8s/base/kustomization.yaml"
    base.write_text(base.read_text().replace("- LOG_FORMAT=json", "- LOG_FORMAT=console"))
    server.done.clear()
    second = runbook.run(server, render, migrate, rollout)
    assert second.returncode == 0, second.stderr
    changes = [change for change in server.done if "jobs/" in change or "deployments/" in change]
    expected = [
        "DELETE jobs/my-service-migrate",
        "POST jobs/my-service-migrate",
        "PATCH deployments/my-service",
    ]
    assert changes == expected


@pytest.mark.slow
def test_a_job_that_is_not_deleted_cannot_be_applied(runbook: Runbook, server: ApiServer) -> None:
    render, secret, _, _, _ = runbook.blocks["First deploy"]
    _, migrate, rollout = runbook.blocks["Rollout"]
    assert runbook.run(server, render, secret, migrate, rollout).returncode == 0
    base = runbook.project / "deploy/k8s/base/kustomization.yaml"
    base.write_text(base.read_text().replace("- LOG_FORMAT=json", "- LOG_FORMAT=console"))
    careless = runbook.run(server, render, rollout)
    assert "field is immutable" in careless.stderr


@pytest.mark.slow
def test_a_migration_that_fails_stops_the_rollout_before_any_pod(
    runbook: Runbook, server: ApiServer
) -> None:
    server.migrations_fail = True
    render, secret, _, _, _ = runbook.blocks["First deploy"]
    _, migrate, rollout = runbook.blocks["Rollout"]
    done = runbook.run(
        server, render, secret, migrate.replace("--timeout=30s", "--timeout=1s"), rollout
    )
    assert done.returncode != 0
    assert "timed out waiting for the condition" in done.stderr
    assert "POST jobs/my-service-migrate" in server.done
    assert not any("deployments" in change for change in server.done)


@pytest.mark.slow
def test_a_rotation_keeps_the_other_secret_and_restarts_the_pods(
    runbook: Runbook, server: ApiServer
) -> None:
    render, secret, _, _, _ = runbook.blocks["First deploy"]
    _, migrate, rollout = runbook.blocks["Rollout"]
    (rotate,) = runbook.blocks["Rotate a secret"]
    assert runbook.run(server, render, secret, migrate, rollout).returncode == 0
    path = "/api/v1/namespaces/my-service-prod/secrets/my-service-secrets"
    before = server.objects[path]["data"]
    server.done.clear()
    done = runbook.run(server, rotate)
    assert done.returncode == 0, done.stderr
    assert server.objects[path]["data"] == before
    assert server.done == ["PUT secrets/my-service-secrets", "PATCH deployments/my-service"]


@pytest.mark.slow
def test_for_tonight_the_autoscaler_keeps_more_pods(runbook: Runbook, server: ApiServer) -> None:
    render, secret, _, _, _ = runbook.blocks["First deploy"]
    _, migrate, rollout = runbook.blocks["Rollout"]
    assert runbook.run(server, render, secret, migrate, rollout).returncode == 0
    patch, *_ = runbook.blocks["Scale"]
    assert runbook.run(server, patch.split("\n")[0] + "\n").returncode == 0
    path = "/apis/autoscaling/v2/namespaces/my-service-prod/horizontalpodautoscalers/my-service"
    assert server.objects[path]["spec"]["minReplicas"] == 6
