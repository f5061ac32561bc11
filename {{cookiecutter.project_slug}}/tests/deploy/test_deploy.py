"""Every overlay, as kustomize renders it, agrees with the Dockerfile, with gunicorn.conf.py and with the settings."""

import os
from pathlib import Path

import pytest
import yaml

from tests.deploy import compose, image, numbers, objects
from tests.deploy.deployed import K8S, OVERLAYS, Deployed, kustomize, read, with_every_component
from tests.deploy.rules import RULES, Rule, faults

MODULES = (compose, image, numbers, objects)  # each adds its rules to RULES
EVERYTHING = "prod with every component"


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The overlay for production with every component of the project."""
    if not kustomize():
        text = "kustomize is missing, and so is kubectl: install one of the two"
        pytest.fail(text) if os.environ.get("CI") == "true" else pytest.skip(text)
    return with_every_component("prod", tmp_path_factory.mktemp("deploy") / "k8s")


@pytest.fixture(params=[*OVERLAYS, EVERYTHING])
def deployed(request: pytest.FixtureRequest, everything: Path) -> Deployed:
    return read("prod", everything) if request.param == EVERYTHING else read(request.param)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_deployment_keeps_its_contract(rule: Rule, deployed: Deployed) -> None:
    found = faults(rule, deployed)
    assert found == [], "\n".join(found)


def test_every_component_is_rendered(everything: Path) -> None:
    files = [file for file in K8S.glob("components/*/*.yaml") if file.name != "kustomization.yaml"]
    kinds = {yaml.safe_load(file.read_text())["kind"] for file in files}
    assert kinds <= {document["kind"] for document in read("prod", everything).documents}
