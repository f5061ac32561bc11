"""Dashboard of the service: every panel shows what happens in a project without the example too.

The test itself is attack/test_panels.py, with a real Prometheus and nginx; `make attack` runs it
with the example.
"""

import os
import subprocess

import pytest

from tests.conftest import ROOT, SERVICE_BIN, Bake, missing


@pytest.mark.slow
def test_every_panel_shows_what_happens_without_the_example(bake: Bake) -> None:
    # The rules have the name of the project, and the suite expects this one.
    project = bake(project_name="service", include_example=False, include_jobs=False)
    python = str(SERVICE_BIN / "python")
    cache = project.parent / "cache"
    options = ["-o", f"cache_dir={cache}", "-o", f"pythonpath=. {project}"]
    done = subprocess.run(
        [python, "-m", "pytest", *options, "attack/test_panels.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if " passed" not in done.stdout:
        missing("Prometheus, Alertmanager, nginx or its exporter")
