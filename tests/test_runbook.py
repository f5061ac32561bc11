"""The runbook of the generated project: its commands exist, and work in the order it gives."""

import json
import os
import re
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.api_server import ApiServer, Document
from tests.conftest import Bake, missing, render

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
DEPLOYMENTS = "/apis/apps/v1/namespaces/my-service-prod/deployments"
LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


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

    def add_consumer(self) -> None:
        """List the components of the consumer in the overlay."""
        overlay = self.project / "deploy/k8s/overlays/prod/kustomization.yaml"
        components = "components: [../../components/consumer, ../../components/gateway-egress]\n"
        overlay.write_text(overlay.read_text() + components)

    def add_jobs(self) -> None:
        """List the components of the jobs, in place of those of the consumer."""
        overlay = self.project / "deploy/k8s/overlays/prod/kustomization.yaml"
        components = "components: [../../components/jobs, ../../components/jobs-keda]\n"
        overlay.write_text(overlay.read_text() + components)

    def change_setting(self) -> None:
        """Change a setting in the base, so that the next rollout has something to do."""
        base = self.project / "deploy/k8s/base/kustomization.yaml"
        base.write_text(base.read_text().replace("- LOG_FORMAT=json", "- LOG_FORMAT=console"))


def add_foreign_deployment(server: ApiServer) -> None:
    """Add a deployment of another service to the namespace."""
    path = f"{DEPLOYMENTS}/my-service"
    other = json.loads(json.dumps(server.objects[path]))
    other["metadata"]["name"] = "other"
    other["metadata"]["labels"]["app.kubernetes.io/name"] = "other"
    server.objects[f"{DEPLOYMENTS}/other"] = other


def config_map(deployment: Document) -> str:
    """Return the name of the ConfigMap that a deployment uses."""
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    name: str = container["envFrom"][0]["configMapRef"]["name"]
    return name


def config_maps(server: ApiServer) -> dict[str, str]:
    """Return the ConfigMap of each deployment of the service."""
    names = ("my-service", "my-service-consumer")
    return {name: config_map(server.objects[f"{DEPLOYMENTS}/{name}"]) for name in names}


def last_applied_config_maps(server: ApiServer) -> dict[str, str]:
    """Return the ConfigMap of each deployment in the annotation of `kubectl apply`."""
    found = {}
    for name in config_maps(server):
        annotations = server.objects[f"{DEPLOYMENTS}/{name}"]["metadata"]["annotations"]
        found[name] = config_map(json.loads(annotations[LAST_APPLIED]))
    return found


def find(documents: list[Document], kind: str, name: str) -> Document:
    """Return the manifest of this kind and name."""
    (found,) = (
        document
        for document in documents
        if (document["kind"], document["metadata"]["name"]) == (kind, name)
    )
    return found


def requests(spec: Document) -> tuple[float, int]:
    """Return the cores and the MiB that a pod requests."""
    (container,) = spec["template"]["spec"]["containers"]
    requested = container["resources"]["requests"]
    cpu = requested["cpu"]
    cores = int(cpu.removesuffix("m")) / 1000 if cpu.endswith("m") else float(cpu)
    return cores, int(requested["memory"].removesuffix("Mi"))


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
def test_rotation_keeps_all_other_secrets_and_restarts_every_deployment(
    runbook: Runbook, server: ApiServer
) -> None:
    """Each process reads its secrets at its start; deployments of other services go on."""
    (rotate,) = runbook.blocks["Rotate a secret"]
    runbook.add_consumer()
    assert runbook.deploy(server).returncode == 0
    path = f"{NAMESPACE}/secrets/my-service-secrets"
    server.objects[path]["data"]["gateway_url"] = "aHR0cHM6Ly86cHdAZ2F0ZXdheS5leGFtcGxl"
    before = dict(server.objects[path]["data"])
    add_foreign_deployment(server)
    server.changes.clear()
    done = runbook.run(server, rotate)
    assert done.returncode == 0, done.stderr
    assert server.objects[path]["data"] == before
    assert server.changes == [
        "PUT secrets/my-service-secrets",
        "PATCH deployments/my-service",
        "PATCH deployments/my-service-consumer",
    ]
    assert done.stdout.count("successfully rolled out") == 2


@pytest.mark.slow
def test_undo_reverts_every_deployment_and_the_next_rollout_removes_fields(
    runbook: Runbook, server: ApiServer
) -> None:
    """`kubectl rollout undo --help`; the warning is kubernetes/kubernetes#137064."""
    undo, apply, _ = runbook.blocks["Undo"]
    runbook.add_consumer()
    assert runbook.deploy(server).returncode == 0
    add_foreign_deployment(server)
    first = config_maps(server)
    base = runbook.project / "deploy/k8s/base/kustomization.yaml"
    text = base.read_text()
    runbook.change_setting()
    render, *_ = runbook.blocks["First deploy"]
    _, migrate, rollout = runbook.blocks["Rollout"]
    assert runbook.run(server, render, migrate, rollout).returncode == 0
    assert config_maps(server).keys() == first.keys()
    assert not set(config_maps(server).values()) & set(first.values())

    server.changes.clear()
    undone = runbook.run(server, undo)
    assert undone.returncode == 0, undone.stderr
    assert undone.stdout.count("rolled back") == 2
    assert config_maps(server) == first
    assert not any("other" in change for change in server.changes)
    warning = "will not update the kubectl.kubernetes.io/last-applied-configuration annotation"
    assert " ".join(runbook.text.split()).count(warning) == 1

    base.write_text(text)
    applied = runbook.run(server, apply)
    assert applied.returncode == 0, applied.stderr
    assert config_maps(server) == first
    assert last_applied_config_maps(server) == first
    assert not any("jobs/" in change for change in server.changes)


@pytest.mark.slow
def test_rollout_waits_for_every_deployment(runbook: Runbook, server: ApiServer) -> None:
    runbook.add_consumer()
    done = runbook.deploy(server)
    assert done.returncode == 0, done.stderr
    assert 'deployment "my-service" successfully rolled out' in done.stdout
    assert 'deployment "my-service-consumer" successfully rolled out' in done.stdout


def test_commands_for_one_component_are_those_for_the_migration(runbook: Runbook) -> None:
    """A command that selects the API would leave the consumer out."""
    blocks = "".join(block for found in runbook.blocks.values() for block in found)
    selected = re.findall(r"component(!?=)(\w+)", blocks)
    assert set(selected) == {("=", "migrate"), ("!=", "migrate")}
    for command in re.findall(r"kubectl rollout .*", blocks):
        assert '--selector="app.kubernetes.io/name=$NAME"' in command


def test_capacity_is_that_of_the_manifests(runbook: Runbook) -> None:
    runbook.add_consumer()
    rendered = render(runbook.project / "deploy/k8s/overlays/prod")
    documents = list(yaml.safe_load_all(rendered))
    autoscaler = find(documents, "HorizontalPodAutoscaler", "my-service")["spec"]
    api = find(documents, "Deployment", "my-service")["spec"]
    consumer = find(documents, "Deployment", "my-service-consumer")["spec"]
    pods = autoscaler["maxReplicas"] + api["strategy"]["rollingUpdate"]["maxSurge"]
    cores, memory = requests(api)
    text = " ".join(runbook.text.split())
    assert (cores, memory) == (0.5, 256)
    assert "a pod requests half a core and 256 MiB" in text
    assert autoscaler["minReplicas"] == 3
    assert f"Three pods are the minimum, and {pods} the maximum" in text
    assert f"{pods * cores:g} cores and {pods * memory / 1024:g} GiB" in text
    pods = consumer["replicas"] + consumer["strategy"]["rollingUpdate"]["maxSurge"]
    cores, memory = requests(consumer)
    assert (consumer["replicas"], pods) == (1, 2)
    assert f"{pods * cores:g} core and {pods * memory / 1024:g} GiB" in text
    cores, memory = requests(find(documents, "Job", "my-service-migrate")["spec"])
    assert f"The migration requests {cores:g} cores and {memory} MiB" in text


def test_capacity_of_the_jobs_is_that_of_the_manifests(bake: Bake, tmp_path: Path) -> None:
    """`maxUnavailable` of a Deployment is rounded down, but is at least 1 if there is no surge."""
    runbook = Runbook(bake(include_jobs=True), tmp_path)
    runbook.add_jobs()
    rendered = render(runbook.project / "deploy/k8s/overlays/prod")
    documents = list(yaml.safe_load_all(rendered))
    jobs = find(documents, "Deployment", "my-service-jobs")["spec"]
    maximum = find(documents, "ScaledObject", "my-service-jobs")["spec"]["maxReplicaCount"]
    strategy = jobs["strategy"]["rollingUpdate"]
    assert strategy == {"maxUnavailable": "25%", "maxSurge": 0}
    cores, memory = requests(jobs)
    text = " ".join(runbook.text.split())
    assert f"three run during a rollout: {3 * cores:g} cores and {3 * memory / 1024:g} GiB" in text
    pods = maximum + maximum // 4
    assert f"up to {maximum}, and {pods} during a rollout" in text
    assert f"{pods * cores:g} cores and {pods * memory / 1024:g} GiB" in text


@pytest.mark.slow
def test_patched_autoscaler_keeps_more_pods(runbook: Runbook, server: ApiServer) -> None:
    assert runbook.deploy(server).returncode == 0
    patch, *_ = runbook.blocks["Scale"]
    first_command = patch.split("\n")[0] + "\n"
    assert runbook.run(server, first_command).returncode == 0
    namespace = NAMESPACE.replace("/api/v1", "/apis/autoscaling/v2")
    autoscaler = server.objects[f"{namespace}/horizontalpodautoscalers/my-service"]
    assert autoscaler["spec"]["minReplicas"] == 6
