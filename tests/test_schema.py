"""The running service matches its OpenAPI document, and no input crashes it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Bake
from tests.projects import tools
from tests.test_readme import addresses, terminal

CASES = 2000
OPTIONS = [
    "--checks=all",
    # DELETE cancels a job, which still exists.
    "--exclude-checks=use_after_free",
    "--max-examples=350",
    "--seed=1",
    "--no-color",
    "--continue-on-failure",
    "--generation-database=none",
]


def schemathesis(url: str, directory: Path) -> str:
    """Check a service against the document at a URL; return a passing report."""
    program = Path(sys.executable).parent / "schemathesis"
    hooks = {"PYTHONPATH": str(ROOT), "SCHEMATHESIS_HOOKS": "tests.schema_hooks"}
    done = subprocess.run(
        [str(program), "run", url, *OPTIONS],
        cwd=directory,
        env=os.environ | hooks,
        capture_output=True,
        check=False,
    )
    report = done.stdout.decode()
    assert done.returncode == 0, report + done.stderr.decode()
    return report


@pytest.mark.slow
def test_schemathesis_finds_no_failure(bake: Bake) -> None:
    project = bake(include_jobs=True)
    free = addresses()
    # The output goes to a file: a terminal that nobody reads would block the service.
    run = ["bash", "-ec", f"exec make --silent run TOOLS={tools()} > service.log"]
    with terminal(run, project, DOCS_ENABLED="true", LOG_FORMAT="json", **free) as running:
        running.wait_for(f"http://{free['BIND']}/health/ready")
        report = schemathesis(f"http://{free['BIND']}/openapi.json", project.parent)
        assert int(re.findall(r"(\d+) generated", report)[0]) >= CASES
    assert '"level":"error"' not in (project / "service.log").read_text()
