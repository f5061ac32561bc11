"""One line makes authentication mandatory, and breaks no test of the generated project."""

import re
from pathlib import Path

import pytest

from tests.conftest import bake_to
from tests.test_feature import link_environment, run

OPEN = "app = create_app(load_settings())\n"
MANDATORY = "app = create_app(load_settings(), dependencies=[AUTHENTICATED])\n"
IMPORT = "from app.lifespan import"
CHECK = """
import pytest

from tests.service_process import Service
from tests.streams import Client


@pytest.mark.parametrize("path", ["/payments", "/conversations/1", "/jobs/1"])
async def test_only_callers_with_a_token_get_in(client: Client, path: str) -> None:
    response = await client.get(path, headers={"Authorization": ""})
    assert response.status_code == 401
    assert (await client.get(path)).status_code != 401


def test_process_is_closed_but_for_its_probes(service: Service) -> None:
    assert service.get("/payments", Authorization="").status_code == 401
    assert service.get("/payments").status_code == 200
    assert service.get("/health/live", Authorization="").status_code == 200
    assert service.get("/", Authorization="").status_code == 200
"""
#: Those that send most of the requests, to the application in the process and to a real one; and
#: those that have a provider or a mandatory dependency of their own.
TESTS = (
    "tests/test_check.py",
    "tests/test_main.py",
    "tests/auth/test_keys.py",
    "tests/conversations/test_conversations.py",
    "tests/jobs/test_router.py",
    "tests/payments/test_payments.py",
    "tests/serving/test_seams.py",
)


def make_mandatory(project: Path) -> None:
    """Make authentication mandatory for all routes of a project but the probes and `/`."""
    main = project / "app/main.py"
    text = main.read_text()
    assert text.count(OPEN) == text.count(IMPORT) == 1
    text = text.replace(OPEN, MANDATORY)
    text = text.replace(IMPORT, f"from app.auth.dependencies import AUTHENTICATED\n{IMPORT}")
    main.write_text(text)


@pytest.mark.slow
def test_mandatory_authentication_breaks_no_test(template: Path, tmp_path: Path) -> None:
    """The line is that of README.md, "Who may call"."""
    project = bake_to(template, tmp_path, include_jobs=True)
    link_environment(project)
    assert MANDATORY.strip() in (project / "README.md").read_text()
    make_mandatory(project)
    (project / "tests/test_check.py").write_text(CHECK)
    options = ["-q", "-p", "no:cacheprovider", "--numprocesses", "2", "--dist", "loadfile"]
    output = run(project, "python", "-m", "pytest", *options, *TESTS)
    assert " passed" in output
    assert not re.search(r"\d (failed|error)", output)
