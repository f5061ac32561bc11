"""What a project is deployed with gives no auditor anything to say: every overlay, component and answer.

`make audit` installs the auditors, next to this environment. What an auditor has to overlook is written here, or at the
place, with its reason.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, bake_to, missing, render, tracked

pytestmark = pytest.mark.slow

AUDITORS = Path(f"{sys.prefix}-audit") / "bin"
OVERLAYS = ("dev", "staging", "prod")
#: The oldest Kubernetes that the base promises to run on; the newest is the newest whose schemas there are.
OLDEST = "1.31"
#: What dev does otherwise on purpose, being for a cluster on a desk. Staging and prod may do nothing of it.
DEV = {
    "CKV_K8S_15": "its image is on the machine alone: there is nothing to pull",
    "CKV_K8S_43": "an image that was never pushed has no digest",
}
#: Kinds of others than Kubernetes: it has no schema for them.
FOREIGN = {"HTTPRoute", "ServiceMonitor"}
YAMLLINT = {
    "extends": "default",
    "rules": {
        "comments": {
            "min-spaces-from-content": 1
        },  # as in the Makefile; one is what GitHub's own tools write
        "document-start": "disable",  # each file is one document
        "indentation": {
            "indent-sequences": "consistent"
        },  # kustomize writes lists at the level of their key
        "line-length": {"max": 120},  # as everywhere in the project
        "truthy": {"check-keys": False},  # `on` is what GitHub calls it
    },
}
#: What kustomize writes has the lines that it has: images with their digests are longer.
YAMLLINT_RENDERED = {"extends": "default", "rules": YAMLLINT["rules"] | {"line-length": "disable"}}  # type: ignore[operator]
#: What tells an auditor in place to overlook something, and what is said beside it.
OVERLOOK = re.compile(
    r"(?:hadolint ignore=|shellcheck disable=|zizmor: ignore|yamllint disable|checkov:skip=)\S*(.*)"
)
SHELL = re.compile(rb"#!.*\b(ba|da)?sh\b")


def audit(auditor: str, *arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run an auditor in a folder; it ends with 0, or with another code if it found something."""
    program = AUDITORS / auditor
    if not program.exists():
        missing(f"{auditor}, which `make audit` installs,")
    return subprocess.run(
        [program, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def hadolint(folder: Path) -> set[str]:
    """Return what hadolint says of the Dockerfiles below a folder."""
    files = sorted(folder.rglob("Dockerfile"))
    assert files
    done = audit("hadolint", "--format", "json", "--no-fail", *files, folder=folder)
    return {f"{item['file']}: {item['code']}" for item in json.loads(done.stdout)}


def checkov(folder: Path) -> set[str]:
    """Return what checkov says of manifests, Dockerfiles and workflows below a folder; hold that it read them all."""
    options = (
        "--skip-download",
        "--output",
        "json",
        "--skip-path",
        "/deploy/k8s/",
    )  # that is rendered
    frameworks = ("kubernetes", "dockerfile", "github_actions")
    done = audit("checkov", "--directory", ".", *options, "--framework", *frameworks, folder=folder)
    reports = json.loads(done.stdout)
    results = [
        report["results"] for report in (reports if isinstance(reports, list) else [reports])
    ]
    checks = [
        check
        for result in results
        for kind in ("passed", "failed")
        for check in result[f"{kind}_checks"]
    ]
    files = {
        path.relative_to(folder)
        for glob in ("Dockerfile", "rendered/*", "workflows/*")
        for path in folder.rglob(glob)
    }
    assert {check["file_path"].lstrip("/") for check in checks} == {
        path.as_posix() for path in files
    }, done.stderr
    return {
        f"{check['file_path'].lstrip('/')}: {check['check_id']}"
        for result in results
        for check in result["failed_checks"]
    }


def kubernetes_validate(folder: Path, *version: str) -> set[str]:
    """Return which manifests below a folder have fields that this Kubernetes does not know; else the newest."""
    files = sorted(folder.rglob("rendered/*.yaml"))
    assert files
    done = audit("kubernetes-validate", "--strict", *version, *files, folder=folder)
    lines = done.stdout.splitlines()
    foreign = [
        line
        for line in lines
        if line.startswith("WARN") and line.split("kind ")[1].split()[0] in FOREIGN
    ]
    documents = [document for file in files for document in yaml.safe_load_all(file.read_text())]
    assert len(lines) == len(documents), done.stderr
    return {line for line in lines if not line.startswith("INFO")} - set(foreign)


def yamllint(folder: Path) -> set[str]:
    """Return what yamllint says of the YAML below a folder, rendered or written."""
    found = set()
    for rendered, rules in ((False, YAMLLINT), (True, YAMLLINT_RENDERED)):
        files = [
            path for path in folder.rglob("*.y*ml") if (path.parent.name == "rendered") is rendered
        ]
        done = audit(
            "yamllint",
            "--strict",
            "--format",
            "parsable",
            "-d",
            json.dumps(rules),
            *files,
            folder=folder,
        )
        assert (done.returncode == 0) is (done.stdout == ""), done.stderr
        found |= set(done.stdout.splitlines())
    return found


def shellcheck(folder: Path) -> set[str]:
    """Return what shellcheck says of the shell below a folder: scripts, and the steps of workflows."""
    scripts = [
        path for path in folder.rglob("*") if path.is_file() and SHELL.match(path.read_bytes())
    ]
    for workflow in folder.rglob("workflows/*.yml"):
        for name, job in yaml.safe_load(workflow.read_text())["jobs"].items():
            for number, step in enumerate(job.get("steps", [])):
                if "run" in step:
                    scripts.append(folder / f"{workflow.stem}-{name}-{number}.sh")
                    scripts[-1].write_text(f"#!/bin/bash\nset -e\n{step['run']}\n")
    assert scripts
    done = audit("shellcheck", "--format", "gcc", *scripts, folder=folder)
    assert (done.returncode == 0) is (done.stdout == ""), done.stderr
    return set(done.stdout.splitlines())


def zizmor(folder: Path) -> set[str]:
    """Return what zizmor says of the workflows and the configuration of Dependabot below a folder."""
    options = (
        "--offline",
        "--collect=all",
        "--strict-collection",
        "--persona=pedantic",
        "--no-exit-codes",
    )
    done = audit("zizmor", *options, "--format=json-v1", ".", folder=folder)
    assert done.returncode == 0, done.stderr
    files = {path.relative_to(folder).as_posix() for path in folder.rglob(".github/**/*.yml")}
    assert set(re.findall(r"completed \./(\S+)", done.stderr)) == files
    return {
        f"{place['symbolic']['key']['Local']['verbatim_path']}: {finding['ident']}"
        for finding in json.loads(done.stdout)
        for place in finding["locations"]
    }


def overlays(project: Path) -> dict[str, str]:
    """Return what a project renders to: each overlay, and staging with each component, and with all of them."""
    folder = project / "deploy/k8s"
    rendered = {name: render(folder / "overlays" / name) for name in OVERLAYS}
    components = sorted(path.name for path in (folder / "components").iterdir())
    staging = yaml.safe_load((folder / "overlays/staging/kustomization.yaml").read_text())
    for name, chosen in {
        "all": components,
        **{component: [component] for component in components},
    }.items():
        place = folder / "overlays" / name
        place.mkdir()
        manifest = staging | {
            "components": [f"../../components/{component}" for component in chosen]
        }
        (place / "kustomization.yaml").write_text(yaml.safe_dump(manifest))
        rendered[f"staging-{name}"] = render(place)
        shutil.rmtree(place)
    return rendered


@pytest.fixture(scope="module")
def audited(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both answers, each with its manifests in `rendered/`, and the scripts of this repository."""
    folder = tmp_path_factory.mktemp("audit")
    for answer in (True, False):
        project = bake_to(
            template, folder / f"example-{answer}", project_slug="orders", include_example=answer
        )
        (project / "rendered").mkdir()
        for name, text in overlays(project).items():
            (project / "rendered" / f"{name}.yaml").write_text(text)
    (folder / "root").mkdir()
    for name in tracked():
        if SHELL.match((ROOT / name).read_bytes()):
            shutil.copy(ROOT / name, folder / "root" / name.replace("/", "-"))
    return folder


def test_hadolint_finds_nothing(audited: Path) -> None:
    assert hadolint(audited) == set()


def test_checkov_finds_nothing_but_what_dev_is_for(audited: Path) -> None:
    on_purpose = {
        f"example-{answer}/orders/rendered/dev.yaml: {check}"
        for answer in (True, False)
        for check in DEV
    }
    assert checkov(audited) == on_purpose


@pytest.mark.parametrize(
    "version", [("--kubernetes-version", OLDEST), ()], ids=["oldest", "newest"]
)
def test_kubernetes_knows_every_field(audited: Path, version: tuple[str, ...]) -> None:
    assert kubernetes_validate(audited, *version) == set()


def test_yamllint_finds_nothing(audited: Path) -> None:
    assert yamllint(audited) == set()


def test_shellcheck_finds_nothing(audited: Path) -> None:
    assert shellcheck(audited) == set()


def test_zizmor_finds_nothing(audited: Path) -> None:
    assert zizmor(audited) == set()


def test_what_is_overlooked_in_place_has_its_reason_beside_it() -> None:
    for name in set(tracked()) - {"tests/test_audit.py"}:
        for place in OVERLOOK.finditer((ROOT / name).read_bytes().decode(errors="replace")):
            assert len(place[1].split()) > 3, (name, place[0])


POD = """
apiVersion: v1
kind: Pod
metadata: {name: orders, namespace: orders}
spec:
  containers:
    - {name: api, image: orders, securityContext: {privileged: true}, ressources: {}}
"""
WORKFLOW = """
on: push
permissions: write-all
jobs:
  build:
    runs-on: ubuntu-latest
    steps:
      - uses: actions/checkout@main
      - run: rm $HOME/${{ github.head_ref }}
"""
PLANTED = {
    "Dockerfile": "FROM debian:latest\n",
    "rendered/pod.yaml": POD,
    ".github/workflows/ci.yml": WORKFLOW,
    "compose.yaml": "services: {}\nservices: {}\n",
    "script": "#!/bin/sh\nrm $1\n",
}


@pytest.mark.parametrize(
    ("auditor", "expected"),
    [
        (hadolint, {"Dockerfile: DL3007"}),
        (
            checkov,
            {
                "pod.yaml: CKV_K8S_16",
                "Dockerfile: CKV_DOCKER_7",
                "ci.yml: CKV_GHA_2",
                "ci.yml: CKV2_GHA_1",
            },
        ),
        (kubernetes_validate, {"'ressources' was unexpected"}),
        (yamllint, {"(key-duplicates)"}),
        (shellcheck, {"script:2:4: note: ", "[SC2086]"}),
        (
            zizmor,
            {
                "ci.yml: unpinned-uses",
                "ci.yml: template-injection",
                "ci.yml: excessive-permissions",
            },
        ),
    ],
)
def test_an_auditor_reports_what_is_planted(
    tmp_path: Path, auditor: Callable[[Path], set[str]], expected: set[str]
) -> None:
    for name, text in PLANTED.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = "\n".join(auditor(tmp_path))
    assert {part for part in expected if part not in found} == set(), found
