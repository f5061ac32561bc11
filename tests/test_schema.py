"""The running service does what its OpenAPI document says: every answer is described, and no input is a bug."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Bake
from tests.test_readme import addresses, terminal

CASES = 2000


@pytest.mark.slow
def test_schemathesis_finds_nothing(bake: Bake) -> None:
    project, free = bake(), addresses()
    tools = f"TOOLS={os.environ.get('TOOLS', ROOT / '.tools')}"
    run = [
        "bash",
        "-ec",
        f"exec make --silent run {tools} > service.log",
    ]  # a terminal that nobody reads would stop it
    with terminal(run, project, DOCS_ENABLED="true", LOG_FORMAT="json", **free) as running:
        running.wait_for(f"http://{free['BIND']}/health/ready")
        command = [
            str(Path(sys.executable).parent / "schemathesis"),
            "run",
            f"http://{free['BIND']}/openapi.json",
        ]
        options = [
            "--checks",
            "all",
            "--max-examples",
            "350",
            "--seed",
            "1",
            "--no-color",
            "--continue-on-failure",
        ]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "SCHEMATHESIS_HOOKS": "tests.schema_hooks",
        }
        cwd, store = project.parent, ["--generation-database", "none"]
        done = subprocess.run(
            [*command, *options, *store], cwd=cwd, env=environment, capture_output=True, check=False
        )
        report = done.stdout.decode()
        assert done.returncode == 0, report + done.stderr.decode()
        assert int(re.findall(r"(\d+) generated", report)[0]) >= CASES
    assert '"level":"error"' not in (project / "service.log").read_text()
