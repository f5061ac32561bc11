"""The running service matches its OpenAPI document, and no input crashes it."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ROOT, Bake
from tests.projects import tools
from tests.schema_hooks import AUTHORIZATION
from tests.test_feature import link_environment
from tests.test_mandatory_authentication import make_mandatory
from tests.test_readme import addresses, terminal

CASES = 2000
OPTIONS = [
    "--checks=all",
    # DELETE cancels a job, which still exists.
    "--exclude-checks=use_after_free",
    "--seed=1",
    "--no-color",
    "--continue-on-failure",
    "--generation-database=none",
]
#: The same checks with a token: most inputs go the same way, so a few are enough.
CASES_WITH_TOKEN = 500
#: Runs in a project: prints an issuer, its audience and a token, and lasts as long as its input.
PROVIDER = """
import sys, time
from app.main import app
from tests.auth.provider import running_provider
from tests.auth.tokens import AUDIENCE
from tests.default_token import scopes
with running_provider() as provider:
    token = provider.mint(scope=" ".join(scopes(app)), exp=int(time.time()) + 3600)
    print(provider.issuer, AUDIENCE, token, flush=True)
    sys.stdin.read()
"""
#: The operations that need no token.
OPEN_PATHS = ("/", "/health/live", "/health/startup", "/health/ready")


def schemathesis(document: str, directory: Path, *options: str, **variables: str) -> str:
    """Check a service against the document at a URL or path; return a passing report."""
    program = Path(sys.executable).parent / "schemathesis"
    hooks = {"PYTHONPATH": str(ROOT), "SCHEMATHESIS_HOOKS": "tests.schema_hooks"}
    done = subprocess.run(
        [str(program), "run", document, *OPTIONS, *options],
        cwd=directory,
        env=os.environ | hooks | variables,
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
        url = f"http://{free['BIND']}/openapi.json"
        report = schemathesis(url, project.parent, "--max-examples=350")
        assert int(re.findall(r"(\d+) generated", report)[0]) >= CASES
    assert '"level":"error"' not in (project / "service.log").read_text()


@contextlib.contextmanager
def running_issuer(project: Path) -> Iterator[tuple[dict[str, str], str]]:
    """Run a provider of a project's tests; yield settings that trust it, and a token."""
    program = [str(project / ".venv/bin/python"), "-c", PROVIDER]
    with subprocess.Popen(
        program, cwd=project, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        issuer, audience, token = process.stdout.readline().split()
        yield {"AUTH_ISSUER": issuer, "AUTH_AUDIENCE": audience}, f"Bearer {token}"


def assert_closed(base: str, document: dict[str, Any]) -> None:
    """Check that each operation requires a token, responds as documented, and documents it."""
    with httpx.Client(base_url=base) as client:
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if path in OPEN_PATHS:
                    assert "security" not in operation
                    continue
                assert operation["security"]
                assert "application/problem+json" in operation["responses"]["401"]["content"]
                response = client.request(method, path)
                assert response.status_code == 401, (method, path)
                assert response.headers["Content-Type"] == "application/problem+json"
                assert response.headers["WWW-Authenticate"].startswith("Bearer realm=")
                assert response.json()["code"] == "unauthorized"


@pytest.mark.slow
def test_schemathesis_finds_no_failure_with_mandatory_authentication(bake: Bake) -> None:
    """With a token of all scopes. Without one, each operation is 401; README, "Who may call"."""
    project = bake(include_jobs=True)
    link_environment(project)
    make_mandatory(project)
    free = addresses()
    run = ["bash", "-ec", f"exec make --silent run TOOLS={tools()} > service.log"]
    with running_issuer(project) as (settings, authorization):
        options = settings | free | {"DOCS_ENABLED": "true", "LOG_FORMAT": "json"}
        with terminal(run, project, **options) as running:
            base = f"http://{free['BIND']}"
            running.wait_for(f"{base}/health/ready")
            headers = {"Authorization": authorization}
            document = httpx.get(f"{base}/openapi.json", headers=headers)
            assert_closed(base, document.json())
            # With `--header` for the document, each case would have a token.
            path = project.parent / "openapi.json"
            path.write_bytes(document.content)
            report = schemathesis(
                str(path),
                project.parent,
                f"--url={base}",
                "--max-examples=20",
                **{AUTHORIZATION: authorization},
            )
    assert int(re.findall(r"(\d+) generated", report)[0]) >= CASES_WITH_TOKEN
    log = (project / "service.log").read_text()
    assert '"level":"error"' not in log
    assert authorization.split()[1] not in log
