"""`make setup` installs from a private index, as an organization's fork configures it."""

import re
from pathlib import Path

import pytest

from tests.conftest import Bake
from tests.private_index import private_index
from tests.projects import make

#: A package without dependencies, which the lock file of each project has.
PACKAGE = "iniconfig"


def lock_one_package(project: Path) -> None:
    """Reduce the lock file to one package, with its hashes."""
    path = project / "requirements-dev.txt"
    (entry,) = re.findall(rf"^{PACKAGE}==.*(?:\n    --hash.*)+\n", path.read_text(), re.MULTILINE)
    path.write_text(entry)


@pytest.mark.slow
def test_setup_trusts_the_authority_and_logs_in(bake: Bake, tmp_path: Path) -> None:
    """pip installs uv from the index, and uv the packages. `house/` has the defaults.

    "SSL Certificate Verification" and "Authentication" of pip, "TLS certificates" of uv.
    """
    project = bake(project_slug="orders")
    lock_one_package(project)
    with private_index(tmp_path) as index:
        house = project / "house"
        house.mkdir()
        (house / "make.mk").write_text(f"export INDEX_URL := {index.url}\n")
        variables = {
            "TOOLS": ".tools",
            "UV_CACHE_DIR": str(tmp_path / "cache"),
            "PIP_RETRIES": "0",
            "NETRC": str(tmp_path / "netrc"),
        }
        with pytest.raises(AssertionError, match="No matching distribution"):
            make(project, "setup", **variables)
        assert index.served == []

        (house / "ca.pem").write_bytes((tmp_path / "ca.pem").read_bytes())
        make(project, "setup", **variables)
        assert f"/simple/{PACKAGE}/" in index.served
        assert list(project.glob(f".venv/lib/python3*/site-packages/{PACKAGE}"))
