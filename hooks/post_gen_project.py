"""Writes the service's name where it is needed, removes the example if nobody wants it, and says what comes next."""

import json
import runpy
import sys
from pathlib import Path

ANSWERS = json.loads(r"""{{ cookiecutter | tojson }}""")


def replace(file, before, after):
    """Replace a line; a second run finds nothing to replace."""
    path = Path(file)
    text = path.read_bytes().decode("utf-8")
    path.write_bytes(text.replace(before + "\n", after + "\n").encode("utf-8"))


slug, description = ANSWERS["project_slug"], json.dumps(ANSWERS["description"], ensure_ascii=False)
replace("pyproject.toml", 'name = "service"', 'name = "%s"' % slug)
replace(
    "pyproject.toml",
    'description = "A production FastAPI service."',
    "description = %s" % description,
)
replace(
    "app/settings.py",
    '    service_name: ServiceName = "service"',
    '    service_name: ServiceName = "%s"' % slug,
)
replace(".env.example", "SERVICE_NAME=service", "SERVICE_NAME=%s" % slug)
if not ANSWERS["include_example"]:
    runpy.run_path("scripts/remove_example.py")["remove"](Path.cwd())
sys.stdout.write(
    "\n%s is ready. Next:\n\n    cd %s\n    make dev\n\nREADME.md has the rest.\n" % (slug, slug)
)
