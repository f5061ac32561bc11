"""`make psql`: any URL that the service accepts, and no password in a command line."""

import os
import subprocess
import sys
from urllib.parse import urlsplit

import pytest

from scripts.psql import connection
from tests.service_process import PROJECT


@pytest.mark.parametrize(
    ("url", "address", "variables"),
    [
        ("postgresql://db/app", "postgresql://db/app", {}),
        ("postgresql://u:p%40ss@h1,h2/app", "postgresql://u@h1,h2/app", {"PGPASSWORD": "p@ss"}),
        (
            "postgresql:///app?host=/run/a%20b&user=u&password=p@ss%2B",
            "postgresql:///app?host=%2Frun%2Fa%20b&user=u",
            {"PGPASSWORD": "p@ss+"},
        ),
        ("postgresql://u:first@h/a?password=b", "postgresql://u@h/a", {"PGPASSWORD": "first"}),
        (
            "postgresql://db?database=app&sslmode=require&sslpassword=secret",
            "postgresql://db?sslmode=require&dbname=app",
            {},
        ),
        (
            "postgresql://db/app?options=-c%20jit%3Doff&search_path=a,+b",
            "postgresql://db/app",
            {"PGOPTIONS": r"-c jit=off -c search_path=a,\ b"},
        ),
    ],
)
def test_passwords_and_server_options_are_in_variables(
    url: str, address: str, variables: dict[str, str]
) -> None:
    assert connection(url) == (address, variables)


def test_psql_connects_with_options_of_asyncpg(database_url: str) -> None:
    parts = urlsplit(database_url)
    options = f"user={parts.username}&password={parts.password}&statement_timeout=7s"
    url = f"postgresql://{parts.hostname}:{parts.port}{parts.path}?{options}&search_path=a,+b"
    done = subprocess.run(
        [sys.executable, "-m", "scripts.psql", "--tuples-only", "--no-align"],
        cwd=PROJECT,
        env=os.environ | {"DATABASE_URL": url},
        input="show statement_timeout; show search_path",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[:2] == ["7s", "a, b"], done.stderr
