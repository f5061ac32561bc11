"""Auditors report nothing about a project's deployment, in all its variants.

`make audit` installs the auditors in an environment of their own. Exceptions are listed here, or at
the place, each with its reason.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, bake_to, missing, render, tracked

pytestmark = pytest.mark.slow

AUDITORS = Path(f"{sys.prefix}-audit") / "bin"
OVERLAYS = ("dev", "staging", "prod")
#: The oldest supported Kubernetes. The newest is the newest whose schemas the auditor has.
OLDEST = "1.31"
#: Exceptions of the dev overlay, which is for a local cluster. Staging and prod have none.
DEV = {
    "CKV_K8S_15": "its image is on the machine alone: there is nothing to pull",
    "CKV_K8S_43": "an image that was never pushed has no digest",
}
#: Custom resources: Kubernetes has no schema for them.
FOREIGN = {"HTTPRoute", "PrometheusRule", "ScaledObject", "ServiceMonitor", "TriggerAuthentication"}
YAMLLINT_RULES: dict[str, Any] = {
    # One space, as in the Makefile and in files that GitHub's own tools write.
    "comments": {"min-spaces-from-content": 1},
    # Each file is one document.
    "document-start": "disable",
    # Kustomize writes lists at the level of their key.
    "indentation": {"indent-sequences": "consistent"},
    "line-length": {"max": 120},
    # `on` is a key of GitHub's workflows.
    "truthy": {"check-keys": False},
}
YAMLLINT = {"extends": "default", "rules": YAMLLINT_RULES}
#: In rendered manifests, images with their digests exceed the line length. So do queries of rules.
YAMLLINT_LONG = {"extends": "default", "rules": YAMLLINT_RULES | {"line-length": "disable"}}
#: The directories of such files.
LONG = {"prometheusrule", "rendered", "rules", "tests"}
#: A comment that suppresses a finding in place; the group is the explanation after it.
SUPPRESSION = re.compile(
    r"(?:hadolint ignore=|shellcheck disable=|zizmor: ignore|yamllint disable|checkov:skip=)\S*(.*)"
)
SHELL = re.compile(rb"#!.*\b(ba|da)?sh\b")


def audit(
    auditor: str, *arguments: str | Path, directory: Path
) -> subprocess.CompletedProcess[str]:
    """Run an auditor in a directory. Its exit code may be non-zero on findings."""
    program = AUDITORS / auditor
    if not program.exists():
        missing(f"{auditor}, which `make audit` installs,")
    return subprocess.run(
        [program, *arguments], cwd=directory, capture_output=True, text=True, check=False
    )


def hadolint(directory: Path) -> set[str]:
    """Return hadolint's findings in the Dockerfiles below a directory."""
    files = sorted(directory.rglob("Dockerfile"))
    assert files
    options = ("--format", "json", "--no-fail")
    done = audit("hadolint", *options, *files, directory=directory)
    return {f"{item['file']}: {item['code']}" for item in json.loads(done.stdout)}


def checkov(directory: Path) -> set[str]:
    """Return checkov's findings in manifests, Dockerfiles and workflows.

    Fails unless checkov has read all of them.
    """
    # Overlays are checked as they render, not as they are written.
    options = ("--skip-download", "--output", "json", "--skip-path", "/deploy/k8s/")
    frameworks = ("--framework", "kubernetes", "dockerfile", "github_actions")
    done = audit("checkov", "--directory", ".", *options, *frameworks, directory=directory)
    reports = json.loads(done.stdout)
    if not isinstance(reports, list):
        reports = [reports]
    failed = [check for each in reports for check in each["results"]["failed_checks"]]
    passed = [check for each in reports for check in each["results"]["passed_checks"]]

    files = {
        path.relative_to(directory).as_posix()
        for glob in ("Dockerfile", "rendered/*", "workflows/*")
        for path in directory.rglob(glob)
    }
    read = {check["file_path"].lstrip("/") for check in passed + failed}
    assert read == files, done.stderr
    return {f"{check['file_path'].lstrip('/')}: {check['check_id']}" for check in failed}


def is_foreign(line: str) -> bool:
    """Return whether a line of kubernetes-validate is about a custom resource."""
    return line.startswith("WARN") and line.split("kind ")[1].split()[0] in FOREIGN


def write_distinct(directory: Path, to: Path) -> list[Path]:
    """Write the rendered manifests with each document once; return the files.

    A component changes a few documents of an overlay, and adds some. The others are the same.
    """
    seen: set[str] = set()
    files = []
    for path in sorted(directory.rglob("rendered/*.yaml")):
        texts = path.read_text().split("\n---\n")
        if new := [text for text in texts if text.strip() not in seen]:
            seen |= {text.strip() for text in new}
            name = path.relative_to(directory).as_posix().replace("/", "-")
            files.append(to / name)
            files[-1].write_text("\n---\n".join(new).rstrip() + "\n")
    return files


def kubernetes_validate(directory: Path, *version: str) -> set[str]:
    """Return manifests with fields that a version of Kubernetes does not know.

    `version` are options of kubernetes-validate; without them it uses the newest.
    """
    with tempfile.TemporaryDirectory() as distinct:
        files = write_distinct(directory, Path(distinct))
        assert files
        done = audit("kubernetes-validate", "--strict", *version, *files, directory=directory)
        number = sum(len(list(yaml.safe_load_all(file.read_text()))) for file in files)
    lines = done.stdout.splitlines()
    assert len(lines) == number, done.stderr
    return {line for line in lines if not line.startswith("INFO") and not is_foreign(line)}


def yamllint(directory: Path) -> set[str]:
    """Return yamllint's findings in the YAML below a directory, rendered or written."""
    found = set()
    with tempfile.TemporaryDirectory() as name:
        rendered = Path(name, "rendered")
        rendered.mkdir()
        paths = [path for path in directory.rglob("*.y*ml") if path.parent.name != "rendered"]
        paths += write_distinct(directory, rendered)
        for is_long, rules in ((False, YAMLLINT), (True, YAMLLINT_LONG)):
            files = [path for path in paths if (path.parent.name in LONG) is is_long]
            options = ("--strict", "--format", "parsable", "-d", json.dumps(rules))
            done = audit("yamllint", *options, *files, directory=directory)
            assert (done.returncode == 0) is (done.stdout == ""), done.stderr
            found |= set(done.stdout.splitlines())
    return found


def write_steps(workflow: Path, directory: Path) -> list[Path]:
    """Write each script of a workflow to its own file; return the files."""
    files = []
    for name, job in yaml.safe_load(workflow.read_text())["jobs"].items():
        for number, step in enumerate(job.get("steps", [])):
            if "run" in step:
                file = directory / f"{workflow.stem}-{name}-{number}.sh"
                file.write_text(f"#!/bin/bash\nset -e\n{step['run']}\n")
                files.append(file)
    return files


def shellcheck(directory: Path) -> set[str]:
    """Return shellcheck's findings in scripts and in steps of workflows."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    scripts = [path for path in files if SHELL.match(path.read_bytes())]
    for workflow in directory.rglob("workflows/*.yml"):
        scripts += write_steps(workflow, directory)
    assert scripts
    done = audit("shellcheck", "--format", "gcc", *scripts, directory=directory)
    assert (done.returncode == 0) is (done.stdout == ""), done.stderr
    return set(done.stdout.splitlines())


def zizmor(directory: Path) -> set[str]:
    """Return zizmor's findings in workflows, and in the configuration of Dependabot and pre-commit.

    Fails unless zizmor has read all of them.
    """
    options = (
        "--offline",
        "--collect=all",
        "--strict-collection",
        "--persona=pedantic",
        "--no-exit-codes",
        "--format=json-v1",
    )
    done = audit("zizmor", *options, ".", directory=directory)
    assert done.returncode == 0, done.stderr
    paths = {*directory.rglob(".github/**/*.yml"), *directory.rglob(".pre-commit-config.yaml")}
    files = {path.relative_to(directory).as_posix() for path in paths}
    assert set(re.findall(r"completed \./(\S+)", done.stderr)) == files
    return {
        f"{place['symbolic']['key']['Local']['verbatim_path']}: {finding['ident']}"
        for finding in json.loads(done.stdout)
        for place in finding["locations"]
    }


def overlays(project: Path) -> dict[str, str]:
    """Return a project's rendered overlays by name.

    Staging is rendered with each component too, and with all of them.
    """
    k8s = project / "deploy/k8s"
    rendered = {name: render(k8s / "overlays" / name) for name in OVERLAYS}
    components = sorted(path.name for path in (k8s / "components").iterdir())
    chosen = {"all": components} | {component: [component] for component in components}
    staging = yaml.safe_load((k8s / "overlays/staging/kustomization.yaml").read_text())
    for name, names in chosen.items():
        overlay = k8s / "overlays" / name
        overlay.mkdir()
        staging["components"] = [f"../../components/{component}" for component in names]
        (overlay / "kustomization.yaml").write_text(yaml.safe_dump(staging))
        rendered[f"staging-{name}"] = render(overlay)
        shutil.rmtree(overlay)
    return rendered


@pytest.fixture(scope="module")
def audited(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with all parts, one with none, and the scripts of this repository.

    Each project has its rendered manifests in `rendered/`.
    """
    directory = tmp_path_factory.mktemp("audit")
    for answer in (True, False):
        output = directory / f"example-{answer}"
        parts = {"include_example": answer, "include_jobs": answer}
        project = bake_to(template, output, project_slug="orders", **parts)
        (project / "rendered").mkdir()
        for name, text in overlays(project).items():
            (project / "rendered" / f"{name}.yaml").write_text(text)
    (directory / "root").mkdir()
    for name in tracked():
        if SHELL.match((ROOT / name).read_bytes()):
            shutil.copy(ROOT / name, directory / "root" / name.replace("/", "-"))
    return directory


def test_hadolint_finds_nothing(audited: Path) -> None:
    assert hadolint(audited) == set()


def test_checkov_finds_only_the_exceptions_of_dev(audited: Path) -> None:
    expected = {
        f"example-{answer}/orders/rendered/dev.yaml: {check}"
        for answer in (True, False)
        for check in DEV
    }
    # OpenShift assigns a high user ID, which its component therefore leaves out.
    expected |= {
        f"example-{answer}/orders/rendered/staging-openshift.yaml: CKV_K8S_40"
        for answer in (True, False)
    }
    assert checkov(audited) == expected


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


def test_suppressed_findings_have_a_reason() -> None:
    for name in set(tracked()) - {"tests/test_audit.py"}:
        text = (ROOT / name).read_bytes().decode(errors="replace")
        for place in SUPPRESSION.finditer(text):
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


CHECKOV_FINDINGS = {
    "pod.yaml: CKV_K8S_16",
    "Dockerfile: CKV_DOCKER_7",
    "ci.yml: CKV_GHA_2",
    "ci.yml: CKV2_GHA_1",
}
ZIZMOR_FINDINGS = {
    "ci.yml: unpinned-uses",
    "ci.yml: template-injection",
    "ci.yml: excessive-permissions",
}
FINDINGS = [
    (hadolint, {"Dockerfile: DL3007"}),
    (checkov, CHECKOV_FINDINGS),
    (kubernetes_validate, {"'ressources' was unexpected"}),
    (yamllint, {"(key-duplicates)"}),
    (shellcheck, {"script:2:4: note: ", "[SC2086]"}),
    (zizmor, ZIZMOR_FINDINGS),
]


@pytest.mark.parametrize(("auditor", "expected"), FINDINGS)
def test_auditors_report_planted_defects(
    tmp_path: Path, auditor: Callable[[Path], set[str]], expected: set[str]
) -> None:
    for name, text in PLANTED.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = "\n".join(auditor(tmp_path))
    assert {part for part in expected if part not in found} == set(), found
