"""The platforms of docs/platforms.md, as far as one machine can show them."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, SOURCE, Bake, render

Document = dict[str, Any]
#: Components that each change only their own part of the manifests.
CONSUMER = ("consumer", "gateway-egress")


def deploy(project: Path, *components: str) -> list[Document]:
    """Return the manifests of the overlay `prod` with these components."""
    overlay = project / "deploy/k8s/overlays/prod"
    file = overlay / "kustomization.yaml"
    listed = [f"../../components/{name}" for name in (*CONSUMER, *components)]
    file.write_text(f"{file.read_text()}components: [{', '.join(listed)}]\n")
    return list(yaml.safe_load_all(render(overlay)))


def of_kind(documents: list[Document], kind: str) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


def pod_specs(documents: list[Document]) -> list[Document]:
    """Return the specification of each pod: API, consumer, and migration if it is a Job."""
    workloads = of_kind(documents, "Deployment") + of_kind(documents, "Job")
    return [document["spec"]["template"]["spec"] for document in workloads]


def containers(spec: Document) -> list[Document]:
    found: list[Document] = spec.get("initContainers", []) + spec["containers"]
    return found


@pytest.mark.parametrize("others", [(), ("migrate-in-pods",), ("argocd", "ipv6")])
def test_openshift_assigns_users_and_groups(bake: Bake, others: tuple[str, ...]) -> None:
    """`MustRunAsRange` of restricted-v2: "Managing security context constraints" of OpenShift."""
    specs = pod_specs(deploy(bake(), *others, "openshift"))
    assert len(specs) == 2 + ("migrate-in-pods" not in others)
    for spec in specs:
        contexts = [
            spec["securityContext"],
            *[each["securityContext"] for each in containers(spec)],
        ]
        for context in contexts:
            assert not context.keys() & {"runAsUser", "runAsGroup", "fsGroup", "supplementalGroups"}
            assert context["runAsNonRoot"]
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}


def test_argo_cd_migrates_before_the_deployments(bake: Bake) -> None:
    """ "Resource Hooks" and "Sync Phases and Waves" in the documentation of Argo CD.

    A Job that is no hook could not be changed; waves start when the one before is healthy.
    """
    documents = deploy(bake(), "argocd")
    (job,) = of_kind(documents, "Job")
    assert job["metadata"]["annotations"] == {
        "argocd.argoproj.io/hook": "Sync",
        "argocd.argoproj.io/hook-delete-policy": "BeforeHookCreation",
    }
    waves = {
        document["metadata"]["name"]: document["metadata"]["annotations"]
        for document in documents
        if document["metadata"].get("annotations", {}).keys() & {"argocd.argoproj.io/sync-wave"}
    }
    assert waves == {
        "my-service": {"argocd.argoproj.io/sync-wave": "1"},
        "my-service-consumer": {"argocd.argoproj.io/sync-wave": "1"},
    }


def test_pods_migrate_by_themselves_without_a_job(bake: Bake) -> None:
    """Flux applies all manifests at once; an init container ends before its pod starts."""
    documents = deploy(bake(), "migrate-in-pods")
    assert of_kind(documents, "Job") == []
    (job,) = of_kind(deploy(bake("with-job")), "Job")
    (expected,) = job["spec"]["template"]["spec"]["containers"]
    (config_map,) = of_kind(documents, "ConfigMap")
    expected["envFrom"][0]["configMapRef"]["name"] = config_map["metadata"]["name"]
    for identity in ("runAsUser", "runAsGroup"):
        del expected["securityContext"][identity]
    for spec in pod_specs(documents):
        assert spec["initContainers"] == [expected]
        volumes = {volume["name"] for volume in spec["volumes"]}
        assert {"tmp", "secrets"} <= volumes
        assert spec["securityContext"]["runAsUser"] == 10001


def test_pods_listen_on_ipv6(bake: Bake) -> None:
    (config_map,) = of_kind(deploy(bake(), "ipv6"), "ConfigMap")
    assert config_map["data"]["BIND"] == "[::]:8000"
    assert config_map["data"]["METRICS_BIND"] == "[::]:9464"


@pytest.mark.parametrize("components", [(), ("egress-pgbouncer",)])
def test_private_addresses_are_those_of_both_ip_versions(
    bake: Bake, components: tuple[str, ...]
) -> None:
    """RFC 1918 and RFC 4193: a policy without IPv6 blocks it."""
    documents = deploy(bake(), *components)
    (policy,) = [
        document
        for document in of_kind(documents, "NetworkPolicy")
        if document["metadata"]["name"] == "my-service"
    ]
    private = [
        {peer["ipBlock"]["cidr"] for peer in rule["to"] if "ipBlock" in peer}
        for rule in policy["spec"]["egress"]
        if all(port["port"] != 53 for port in rule["ports"])
    ]
    assert len(private) == 1 + len(components)
    for blocks in private:
        assert blocks == {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"}


def test_document_names_every_platform_and_component() -> None:
    text = (ROOT / "docs/platforms.md").read_text()
    names = "Argo CD|Flux|OpenShift|IPv6|INDEX_URL|BuildKit|arm64|3\\.14|server_login_retry|Windows"
    assert set(re.findall(names, text)) == set(names.replace("\\", "").split("|"))
    for name in re.findall(r"`components/([a-z0-9-]+)`", text):
        assert (ROOT / SOURCE / "deploy/k8s/components" / name).is_dir(), name
