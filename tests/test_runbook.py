"""The runbook of the generated project: its commands exist, and work in the order it gives."""

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

#: kubectl for the fake API server, which has no schemas and does not read protobuf, the format of
#: `create secret`.
KUBECTL = """#!/bin/sh
case "$1 $2 $*" in
*--dry-run*|*--help) ;;
"create secret "*)
  KUBECTL "$@" --dry-run=client --output=yaml | KUBECTL create --validate=false -f -
  exit
  ;;
apply*|replace*) verb=$1; shift; set -- "$verb" --validate=false "$@";;
esac
exec KUBECTL "$@"
"""
#: An editor that writes one line to each file.
EDITOR = """#!/bin/sh
for file; do echo "postgresql://app@postgres/app" > "$file"; done
"""
CONTEXT = """
kubectl config set-cluster it --server=http://127.0.0.1:{port}
kubectl config set-context it --cluster=it
kubectl config use-context it
"""
BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)
HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
NAMESPACE = "/api/v1/namespaces/my-service-prod"


class Runbook:
    """The commands of a generated runbook, by heading, for a kubectl of the fake API server."""

    def __init__(self, project: Path, home: Path) -> None:
        self.project = project
        self.home = home
        self.text = (project / "docs/runbook.md").read_text()
        headings = ["", *HEADING.findall(self.text)]
        sections = HEADING.split(self.text)[::2]
        self.blocks = {
            heading: [textwrap.dedent(block) for block in BLOCK.findall(section)]
            for heading, section in zip(headings, sections, strict=True)
        }

    def run(self, server: ApiServer, *blocks: str) -> subprocess.CompletedProcess[str]:
        """Run blocks in one shell that exits at the first command that fails."""
        kubectl = str(shutil.which("kubectl"))
        self._install("kubectl", KUBECTL.replace("KUBECTL", kubectl))
        self._install("editor", EDITOR)
        environment = os.environ | {
            "PATH": f"{self.home / 'bin'}:{os.environ['PATH']}",
            "KUBECONFIG": str(self.home / "config"),
            "HOME": str(self.home),
            "EDITOR": str(self.home / "bin/editor"),
            "TMPDIR": str(self.home),
        }
        context = CONTEXT.format(port=server.server_port)
        script = context + "".join([*self.blocks[""], *blocks])
        command = ["bash", "-euo", "pipefail", "-c", script]
        return subprocess.run(
            command, cwd=self.project, env=environment, capture_output=True, text=True, check=False
        )

    def _install(self, name: str, script: str) -> None:
        program = self.home / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(script)
        program.chmod(0o755)

    def deploy(self, server: ApiServer) -> subprocess.CompletedProcess[str]:
        """Run the first deploy without labels: namespace, secret, migration, rollout."""
        render, secret, _, _, _ = self.blocks["First deploy"]
        _, migrate, rollout = self.blocks["Rollout"]
        return self.run(server, render, secret, migrate, rollout)

    def change_setting(self) -> None:
        """Change a setting in the base, so that the next rollout has something to do."""
        base = self.project / "deploy/k8s/base/kustomization.yaml"
        base.write_text(base.read_text().replace("- LOG_FORMAT=json", "- LOG_FORMAT=console"))


@pytest.fixture
def runbook(bake: Bake, tmp_path: Path) -> Runbook:
    if not shutil.which("kubectl"):
        missing("kubectl")
    home = tmp_path / "home"
    home.mkdir()
    return Runbook(bake(), home)


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


def test_kubectl_commands_exist_with_their_options(runbook: Runbook) -> None:
    blocks = "".join(block for found in runbook.blocks.values() for block in found)
    parts = [part.strip() for line in blocks.splitlines() for part in re.split(r"[|]|&&", line)]
    commands = [part.split(">")[0] for part in parts if part.startswith("kubectl ")]
    assert len(commands) > 20
    for command in commands:
        script = f"NAME=name OVERLAY=prod RENDERED=file SECRETS=directory; {command} --help"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr)


def test_links_and_paths_exist(runbook: Runbook) -> None:
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", name.lower()).replace(" ", "-")
        for name in HEADING.findall(runbook.text)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", runbook.text)) <= anchors
    for name in re.findall(r"`(deploy/[\w/.-]+)`", runbook.text):
        assert (runbook.project / name).exists(), name


@pytest.mark.slow
def test_first_deploy_and_second_rollout_migrate_before_the_pods(
    runbook: Runbook, server: ApiServer
) -> None:
    """The first deploy ends with all pods ready, and the second rollout has its own migration."""
    render, secret, label, _, wait = runbook.blocks["First deploy"]
    _, migrate, rollout = runbook.blocks["Rollout"]
    first = runbook.run(server, render, secret, label, migrate, rollout, wait)
    assert first.returncode == 0, first.stderr
    assert "secret/my-service-secrets created" in first.stdout
    assert "namespace/ingress labeled" in first.stdout
    assert "successfully rolled out" in first.stdout
    position = server.changes.index
    secret_at = position("POST secrets/my-service-secrets")
    migration_at = position("POST jobs/my-service-migrate")
    assert position("POST namespaces/my-service-prod") < secret_at
    assert position("POST networkpolicies/my-service") < migration_at
    assert secret_at < migration_at < position("POST deployments/my-service")
    assert not list(runbook.home.rglob("database_url"))

    runbook.change_setting()
    server.changes.clear()
    second = runbook.run(server, render, migrate, rollout)
    assert second.returncode == 0, second.stderr
    changes = [change for change in server.changes if "jobs/" in change or "deployments/" in change]
    assert changes == [
        "DELETE jobs/my-service-migrate",
        "POST jobs/my-service-migrate",
        "PATCH deployments/my-service",
    ]


@pytest.mark.slow
def test_rollout_without_deleting_the_job_fails(runbook: Runbook, server: ApiServer) -> None:
    assert runbook.deploy(server).returncode == 0
    runbook.change_setting()
    render, *_ = runbook.blocks["First deploy"]
    _, _, rollout = runbook.blocks["Rollout"]
    careless = runbook.run(server, render, rollout)
    assert "field is immutable" in careless.stderr


@pytest.mark.slow
def test_failed_migration_stops_the_rollout_before_any_pod(
    runbook: Runbook, server: ApiServer
) -> None:
    server.migrations_fail = True
    render, secret, _, _, _ = runbook.blocks["First deploy"]
    _, migrate, rollout = runbook.blocks["Rollout"]
    impatient = migrate.replace("--timeout=30s", "--timeout=1s")
    done = runbook.run(server, render, secret, impatient, rollout)
    assert done.returncode != 0
    assert "timed out waiting for the condition" in done.stderr
    assert "POST jobs/my-service-migrate" in server.changes
    assert not any("deployments" in change for change in server.changes)


@pytest.mark.slow
def test_rotation_keeps_the_other_secret_and_restarts_the_pods(
    runbook: Runbook, server: ApiServer
) -> None:
    (rotate,) = runbook.blocks["Rotate a secret"]
    assert runbook.deploy(server).returncode == 0
    path = f"{NAMESPACE}/secrets/my-service-secrets"
    before = server.objects[path]["data"]
    server.changes.clear()
    done = runbook.run(server, rotate)
    assert done.returncode == 0, done.stderr
    assert server.objects[path]["data"] == before
    assert server.changes == ["PUT secrets/my-service-secrets", "PATCH deployments/my-service"]


@pytest.mark.slow
def test_patched_autoscaler_keeps_more_pods(runbook: Runbook, server: ApiServer) -> None:
    assert runbook.deploy(server).returncode == 0
    patch, *_ = runbook.blocks["Scale"]
    first_command = patch.split("\n")[0] + "\n"
    assert runbook.run(server, first_command).returncode == 0
    namespace = NAMESPACE.replace("/api/v1", "/apis/autoscaling/v2")
    autoscaler = server.objects[f"{namespace}/horizontalpodautoscalers/my-service"]
    assert autoscaler["spec"]["minReplicas"] == 6
