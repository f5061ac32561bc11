"""Every overlay agrees with the Dockerfile, gunicorn.conf.py, compose.yaml and the settings."""

from pathlib import Path

import pytest
import yaml

from tests.deploy.checking import Rule, find_problems
from tests.deploy.deployed import K8S, OVERLAYS, Deployed, kustomize, read, with_every_component
from tests.deploy.rules import RULES

EVERY_COMPONENT = "prod with every component"


@pytest.fixture(scope="module")
def every_component(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the overlay for production with every component of the project."""
    kustomize()  # before any copy: skips without it
    return with_every_component("prod", tmp_path_factory.mktemp("deploy") / "k8s")


@pytest.fixture(params=[*OVERLAYS, EVERY_COMPONENT])
def deployed(request: pytest.FixtureRequest, every_component: Path) -> Deployed:
    if request.param == EVERY_COMPONENT:
        return read("prod", every_component)
    return read(request.param)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_deployment_follows_the_rule(rule: Rule, deployed: Deployed) -> None:
    problems = find_problems(rule, deployed)
    assert problems == [], "\n".join(problems)


def test_every_component_is_rendered(every_component: Path) -> None:
    files = [file for file in K8S.glob("components/*/*.yaml") if file.name != "kustomization.yaml"]
    kinds = {yaml.safe_load(file.read_text())["kind"] for file in files}
    assert kinds <= {document["kind"] for document in read("prod", every_component).documents}
