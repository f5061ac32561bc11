"""Refuses answers that would make a project that does not work: one line for each fault, before anything is written."""

import json
import re
import sys

# Answers are data: as JSON in a raw string they cannot become code, whatever they hold.
ANSWERS = json.loads(r"""{{ cookiecutter | tojson }}""")

SLUG = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
LONGEST = {"project_slug": 40, "project_name": 60, "description": 200, "owner": 100}
#: Names that Windows keeps for devices, and names of this project's own dependencies and folders, which would hide
#: what they name.
RESERVED = {
    *(
        "con",
        "prn",
        "aux",
        "nul",
        *(f"{device}{number}" for device in ("com", "lpt") for number in range(10)),
    ),
    *(
        "alembic",
        "asyncpg",
        "fastapi",
        "gunicorn",
        "httptools",
        "httpx",
        "orjson",
        "pydantic",
        "pydantic-settings",
    ),
    *(
        "prometheus-client",
        "pytest",
        "redis",
        "sqlalchemy",
        "starlette",
        "uvicorn",
        "uvicorn-worker",
        "uvloop",
    ),
    *("app", "migrations", "postgres", "scripts", "test", "tests"),
}


def faults_of_slug(value):
    """Yield what is wrong with the name for machines: it names a folder, a package, containers and DNS labels."""
    if value in RESERVED:
        yield "is reserved; choose another name, such as my-%s" % value
    elif not SLUG.fullmatch(value):
        yield "takes lower-case letters, digits and single hyphens between them, and starts with a letter"


def faults(name, value):
    """Yield one sentence for each fault of an answer."""
    if not value.strip():
        yield "must not be empty"
        return
    if len(value) > LONGEST[name]:
        yield "has %d characters; at most %d fit" % (len(value), LONGEST[name])
    if not value.isprintable():
        yield "takes printable characters on one line"
    elif name == "project_slug":
        yield from faults_of_slug(value)


def main():
    """Print each fault on stderr, the value escaped; return the exit code."""
    code = 0
    for name in LONGEST:
        value = str(ANSWERS[name])
        for fault in faults(name, value):
            shown = value if len(value) <= 80 else value[:77] + "..."
            sys.stderr.write("%s=%s: %s\n" % (name, json.dumps(shown), fault))
            code = 1
    return code


sys.exit(main())
