"""Every overlay, as kustomize renders it, agrees with the Dockerfile, with gunicorn.conf.py and with the settings."""

import os
from pathlib import Path

import pytest

from tests.deploy import image, numbers, objects
from tests.deploy.deployed import OVERLAYS, Deployed, kustomize, read, with_every_component
from tests.deploy.rules import RULES, Rule, faults

MODULES = (image, numbers, objects)  # each adds its rules to RULES
EVERYTHING = "prod with every component"


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The overlay for production with every component of the project."""
    return with_every_component("prod", tmp_path_factory.mktemp("deploy") / "k8s")


@pytest.fixture(params=[*OVERLAYS, EVERYTHING])
def deployed(request: pytest.FixtureRequest, everything: Path) -> Deployed:
    if not kustomize():
        text = "kustomize is missing, and so is kubectl: install one of the two"
        pytest.fail(f"{text}, or unset CI") if os.environ.get("CI") == "true" else pytest.skip(text)
    return read("prod", everything) if request.param == EVERYTHING else read(request.param)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_deployment_keeps_its_contract(rule: Rule, deployed: Deployed) -> None:
    assert "\n".join(faults(rule, deployed)) == ""


def test_every_component_is_rendered(everything: Path) -> None:
    kinds = {document["kind"] for document in read("prod", everything).documents}
    assert kinds == {*objects.API_VERSIONS, *objects.OPTIONAL}
