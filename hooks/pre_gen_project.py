"""Reject answers that would make a broken project, with one line for each error.

Runs before any file is written.
"""

import json
import re
import sys

# Answers are data: as JSON in a raw string they cannot become code, whatever they contain.
ANSWERS = json.loads(r"""{{ cookiecutter | tojson }}""")

SLUG = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
SLUG_RULE = "must be lower-case letters, digits and single hyphens, starting with a letter"
MAX_LENGTH = {"project_slug": 40, "project_name": 60, "description": 200, "owner": 100}
MAX_SHOWN = 80
#: The texts that cookiecutter 2.7 accepts for a boolean. Older versions pass any text as it is.
BOOLEANS = frozenset(["1", "true", "t", "yes", "y", "on", "0", "false", "f", "no", "n", "off"])

#: Names that Windows keeps for devices.
DEVICES = (
    "con prn aux nul com0 com1 com2 com3 com4 com5 com6 com7 com8 com9 "
    "lpt0 lpt1 lpt2 lpt3 lpt4 lpt5 lpt6 lpt7 lpt8 lpt9"
)
#: A project named after one of its dependencies would hide that dependency.
DEPENDENCIES = (
    "alembic asyncpg fastapi gunicorn httptools httpx orjson prometheus-client pydantic "
    "pydantic-settings pytest redis sqlalchemy starlette uvicorn uvicorn-worker uvloop"
)
#: A project named after one of its own directories or containers would hide that one.
OWN_NAMES = "app migrations postgres scripts test tests"
RESERVED = frozenset((DEVICES + " " + DEPENDENCIES + " " + OWN_NAMES).split())


def slug_errors(value):
    """Yield the errors of the slug: it names a directory, a package, containers and DNS labels."""
    if value in RESERVED:
        yield "is reserved; choose another name, for example my-%s" % value
    elif not SLUG.fullmatch(value):
        yield SLUG_RULE


def errors(name, value):
    """Yield one text for each error of an answer."""
    if not value.strip():
        yield "must not be empty"
        return
    if len(value) > MAX_LENGTH[name]:
        yield "must be at most %d characters, but has %d" % (MAX_LENGTH[name], len(value))
    if not value.isprintable():
        yield "must be one line of printable characters"
    elif name == "project_slug":
        yield from slug_errors(value)


def report(name, value, error):
    """Print an error to stderr, with the value escaped."""
    shown = value
    if len(value) > MAX_SHOWN:
        shown = value[: MAX_SHOWN - 3] + "..."
    sys.stderr.write("%s=%s: %s\n" % (name, json.dumps(shown), error))


def main():
    """Print each error; return the exit code."""
    code = 0
    for name in MAX_LENGTH:
        value = str(ANSWERS[name])
        for error in errors(name, value):
            report(name, value, error)
            code = 1
    for name in ("include_example", "include_jobs"):
        wanted = str(ANSWERS[name])
        if wanted.strip().lower() not in BOOLEANS:
            report(name, wanted, "must be yes or no")
            code = 1
    return code


sys.exit(main())
