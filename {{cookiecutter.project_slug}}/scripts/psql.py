"""Run psql on the database of `DATABASE_URL`, with psql's own arguments."""

import os
import re
import sys
from urllib.parse import parse_qsl, quote, unquote, urlencode

from app.network.connection_urls import ASYNCPG_OPTIONS
from app.settings import load_settings
from scripts.dev_services import find_psql

NO_PSQL = "no psql: install Postgres' client (`postgresql-client` on Debian)"
#: Not in the command line. psql asks for the second one, that of a key.
PASSWORDS = {"password", "sslpassword"}


def connection(url: str) -> tuple[str, dict[str, str]]:
    """Return the URL for the command line, which every user can read, and the variables.

    The variables have the password, and the options that asyncpg passes to the server.
    """
    address, _, query = url.partition("?")
    options = dict(parse_qsl(query))
    if "database" in options:
        options["dbname"] = options.pop("database")
    start, at, hosts = address.partition("@")
    password = options.get("password", "")
    if at:
        scheme, _, credentials = start.partition("://")
        user, _, own_password = credentials.partition(":")
        password = unquote(own_password) or password
        address = f"{scheme}://{user}@{hosts}"
    shared = {name: options[name] for name in options if name in ASYNCPG_OPTIONS - PASSWORDS}
    if shared:
        address += f"?{urlencode(shared, quote_via=quote)}"
    variables = {"PGPASSWORD": password, "PGOPTIONS": _server_options(options)}
    return address, {name: value for name, value in variables.items() if value}


def _server_options(options: dict[str, str]) -> str:
    """Return the parameters of the server in the form of its command line."""
    given = [options["options"]] if "options" in options else []
    for name in options.keys() - ASYNCPG_OPTIONS - {"options"}:
        value = re.sub(r"([\\\s])", r"\\\1", options[name])
        given.append(f"-c {name}={value}")
    return " ".join(given)


def main(arguments: list[str]) -> None:
    """Replace this process by psql. Raises `SystemExit` without a psql."""
    program = find_psql()
    if program is None:
        sys.exit(NO_PSQL)
    url, variables = connection(load_settings().database_url.get_secret_value())
    os.execve(program, [program, url, *arguments], os.environ | variables)  # noqa: S606


if __name__ == "__main__":
    main(sys.argv[1:])
