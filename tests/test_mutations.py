"""The contract of a deployment notices deliberate regressions, one at a time, and names what is wrong."""

import json
import os
import shutil
import subprocess

import pytest

from tests.conftest import ROOT, SERVICE_BIN, SOURCE, missing
from tests.mutations import MUTATIONS, NOTHING, Mutation

pytestmark = pytest.mark.slow
Faults = dict[str, list[str]]


def is_caught(mutation: Mutation, faults: Faults) -> bool:
    """Tell whether a fault names what the mutation has broken."""
    return any(mutation.word in fault for fault in faults[mutation.what])


@pytest.fixture(scope="module")
def faults() -> Faults:
    """What the contract says of each mutation, in one run of the service's own interpreter."""
    python = SERVICE_BIN / "python"
    if not python.exists():
        missing(f"{python}, which `make test` makes,")
    if not shutil.which("kustomize") and not shutil.which("kubectl"):
        missing("kustomize, and so is kubectl: one of the two")
    done = subprocess.run(
        [python, ROOT / "tests/mutations.py"],
        cwd=ROOT / SOURCE,
        env=os.environ | {"PYTHONPATH": "."},
        stdout=subprocess.PIPE,
        check=True,
    )
    found: Faults = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_the_contract_names(mutation: Mutation, faults: Faults) -> None:
    assert is_caught(mutation, faults), faults[mutation.what]


def test_what_is_not_broken_is_not_caught(faults: Faults) -> None:
    assert faults[NOTHING.what] == []
    assert not is_caught(NOTHING, faults)


def test_each_mutation_has_a_name_and_a_word_of_its_own() -> None:
    assert len({mutation.what for mutation in MUTATIONS}) == len(MUTATIONS) >= 46
    assert all(mutation.word for mutation in MUTATIONS)
