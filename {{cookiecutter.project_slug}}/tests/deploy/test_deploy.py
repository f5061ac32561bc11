"""Every overlay agrees with the Dockerfile, gunicorn.conf.py, compose.yaml and the settings."""

from pathlib import Path

import pytest
import yaml

from tests.deploy.checking import Rule, find_problems
from tests.deploy.deployed import (
    COMPONENTS,
    K8S,
    OVERLAYS,
    REPLACING,
    Deployed,
    has_reader,
    kustomize,
    read,
    with_components,
    with_every_component,
)
from tests.deploy.rules import RULES

EVERY_COMPONENT = "prod with every component"
OTHER_PLATFORM = "prod without a Job, and with users that the platform assigns"


@pytest.fixture(scope="module")
def every_component(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the overlay for production with every component of the project."""
    kustomize()  # before any copy: skips without it
    return with_every_component("prod", tmp_path_factory.mktemp("deploy") / "k8s")


@pytest.fixture(scope="module")
def other_platform(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the overlay for production on a platform such as OpenShift with Flux."""
    kustomize()
    others = [name for name in COMPONENTS if name not in [*REPLACING, "userns"]]
    return with_components("prod", tmp_path_factory.mktemp("other") / "k8s", [*others, *REPLACING])


@pytest.fixture(params=[*OVERLAYS, EVERY_COMPONENT, OTHER_PLATFORM])
def deployed(
    request: pytest.FixtureRequest, every_component: Path, other_platform: Path
) -> Deployed:
    if request.param == EVERY_COMPONENT:
        return read("prod", every_component)
    if request.param == OTHER_PLATFORM:
        return read("prod", other_platform)
    return read(request.param)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_deployment_follows_the_rule(rule: Rule, deployed: Deployed) -> None:
    problems = find_problems(rule, deployed)
    assert problems == [], "\n".join(problems)


@pytest.mark.parametrize(
    ("variable", "is_read"),
    [
        ("DRAIN_SECONDS", True),
        ("TZ", True),
        ("HTTPS_PROXY", True),
        ("no_proxy", True),
        ("SSL_CERT_FILE", True),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", True),
        ("DRAIN_SECOND", False),
        ("HTTPS_PROXIES", False),
        ("tz", False),
    ],
)
def test_variables_of_libraries_are_known_by_name(variable: str, is_read: bool) -> None:
    assert has_reader(variable) is is_read


def test_every_component_is_rendered(every_component: Path) -> None:
    files = [file for file in K8S.glob("components/*/*.yaml") if file.name != "kustomization.yaml"]
    kinds = {yaml.safe_load(file.read_text())["kind"] for file in files}
    assert kinds <= {document["kind"] for document in read("prod", every_component).documents}
