"""Run psql on the database of `DATABASE_URL`, with psql's own arguments."""

import os
import sys
from urllib.parse import unquote, urlsplit

from app.settings import load_settings
from scripts.dev_services import find_psql

NO_PSQL = "no psql: install Postgres' client (`postgresql-client` on Debian)"


def main(arguments: list[str]) -> None:
    """Replace this process by psql. Raises `SystemExit` without a psql."""
    url = load_settings().database_url.get_secret_value()
    program = find_psql()
    if program is None:
        sys.exit(NO_PSQL)
    credentials, at, _ = urlsplit(url).netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    environment = dict(os.environ)
    if at and password:
        # Not in the command line, which every user of the machine can read.
        environment["PGPASSWORD"] = unquote(password)
        url = url.replace(f"{credentials}@", f"{user}@", 1)
    os.execve(program, [program, url, *arguments], environment)  # noqa: S606


if __name__ == "__main__":
    main(sys.argv[1:])
