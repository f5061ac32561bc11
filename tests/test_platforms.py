"""The platforms of docs/platforms.md, as far as one machine can show them."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, SOURCE, Bake, render, tracked, tree
from tests.parts import ALL_PARTS, Parts, bake_parts, parts_id

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


#: Names that Windows keeps for devices, with any suffix: "Naming Files, Paths, and Namespaces".
DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def windows_problems(names: list[str]) -> list[str]:
    """Return the paths that Windows, or a file system without case, cannot have."""
    folded = [name.casefold() for name in names]
    return [
        name
        for name in names
        if folded.count(name.casefold()) > 1
        or any(DEVICE.fullmatch(part) or part[-1] in ". " for part in name.split("/"))
        or re.search(r'[<>:"|?*\\\x00-\x1f]', name)
    ]


def test_windows_can_have_every_file() -> None:
    assert windows_problems(tracked()) == []
    planted = ["a/Con.txt", "a./b", "a ", "README.md", "readme.md", "a:b"]
    assert windows_problems([*planted, "docs/console.md"]) == planted


@pytest.mark.parametrize("parts", [ALL_PARTS, ()], ids=parts_id)
def test_projects_have_line_feeds_only(bake: Bake, parts: Parts) -> None:
    """Python on Windows writes CRLF unless told not to; cookiecutter keeps the template's."""
    for name, content in tree(bake_parts(bake, parts)).items():
        assert b"\r" not in content, name


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "hooks").glob("*.py")))
def test_hooks_run_on_windows(name: str) -> None:
    """They start no program, and use nothing that only POSIX has."""
    text = (ROOT / "hooks" / name).read_text()
    posix = r"\b(fcntl|pwd|grp|resource|termios|fork|chmod|chown|symlink|subprocess|os\.system)\b"
    assert re.findall(posix, text) == []
    assert "read_text" not in text, "its default encoding is not UTF-8 on Windows"
    assert "write_text" not in text, "it writes CRLF on Windows"


#: Features that macOS lacks: GNU options of its BSD tools, and bash after 3.2.
GNU_ONLY = re.compile(
    r"sed -[nE]*i |sed [^|]*\\t|sed [^|]*\[\^?[^]]*\\t|readlink -f|date (-d|--date)|grep -P|stat -c"
    r"|cp --|xargs -[a-z]*[rd]|\bmapfile\b|\breadarray\b|declare -A|\$\$?\{\w+(,,|\^\^)|\|&|&>>"
)


def test_make_uses_no_gnu_only_tools() -> None:
    """The manuals of sed(1), readlink(1), date(1) of macOS; NEWS of bash 4.0."""
    for name in ("Makefile", f"{SOURCE}/Makefile"):
        lines = (ROOT / name).read_text().splitlines()
        assert [line for line in lines if GNU_ONLY.search(line)] == [], name
    assert GNU_ONLY.search("sed -n 's/a/\\1\\t/p'")
    assert GNU_ONLY.search("readlink -f x")


@pytest.mark.parametrize("directory", [ROOT, ROOT / SOURCE], ids=["template", "service"])
def test_help_is_the_same_with_a_posix_shell(directory: Path) -> None:
    """make runs recipes with /bin/sh, which is dash on Debian and bash 3.2 on macOS."""
    outputs = {
        subprocess.run(
            ["make", "--silent", "help", f"SHELL={shell}"],
            cwd=directory,
            check=True,
            capture_output=True,
        ).stdout
        for shell in filter(None, map(shutil.which, ("sh", "bash", "dash")))
    }
    assert len(outputs) == 1


def test_linux_paths_have_an_alternative() -> None:
    """Only Linux has /proc and /dev/shm: each module that reads them handles an error."""
    for path in sorted((ROOT / SOURCE / "app").rglob("*.py")):
        text = path.read_text()
        code = "\n".join(line for line in text.splitlines() if not line.strip().startswith("#"))
        if re.search(r"[\"']/(proc|dev/shm|sys/fs)", code):
            guard = r"except .*(OSError|FileNotFoundError)|suppress\(|\.is_dir\(\)|sys\.platform"
            assert re.search(guard, code), path.name
