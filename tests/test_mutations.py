"""The deployment rules report deliberate regressions, one at a time, and identify each."""

import json
import os
import shutil
import subprocess

import pytest

from tests.conftest import ROOT, SERVICE_BIN, SOURCE, missing
from tests.mutations import MUTATIONS, NO_MUTATION, Mutation

pytestmark = pytest.mark.slow

#: The problems of each mutation, by its description.
Problems = dict[str, list[str]]


def is_caught(mutation: Mutation, problems: Problems) -> bool:
    """Return whether a problem contains the expected text of a mutation."""
    return any(mutation.expected in problem for problem in problems[mutation.description])


@pytest.fixture(scope="module")
def problems() -> Problems:
    """The problems of all mutations, from one run of the service's interpreter."""
    python = SERVICE_BIN / "python"
    if not python.exists():
        missing(f"{python}, which `make test` makes,")
    if not shutil.which("kustomize") and not shutil.which("kubectl"):
        missing("kustomize (kubectl contains it, too)")
    done = subprocess.run(
        [python, ROOT / "tests/mutations.py"],
        cwd=ROOT / SOURCE,
        env=os.environ | {"PYTHONPATH": "."},
        stdout=subprocess.PIPE,
        check=True,
    )
    found: Problems = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.description)
def test_mutation_is_caught(mutation: Mutation, problems: Problems) -> None:
    assert is_caught(mutation, problems), problems[mutation.description]


def test_unchanged_deployment_has_no_problems(problems: Problems) -> None:
    assert problems[NO_MUTATION.description] == []
    assert not is_caught(NO_MUTATION, problems)


def test_mutations_have_distinct_descriptions_and_expected_texts() -> None:
    assert len({mutation.description for mutation in MUTATIONS}) == len(MUTATIONS) >= 46
    assert all(mutation.expected for mutation in MUTATIONS)
