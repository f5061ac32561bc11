"""Write the answers into the project, remove the parts that are not wanted, print the next steps.

Offline, deterministic and idempotent: `cruft update` runs it again.
"""

import json
import runpy
import sys
from pathlib import Path

ANSWERS = json.loads(r"""{{ cookiecutter | tojson }}""")
#: A boolean as text, as cookiecutter before 2.7 passes it. The first hook rejects unknown texts.
YES = frozenset(["1", "true", "t", "yes", "y", "on"])

NEXT_STEPS = """
%(slug)s is ready. Next:

    cd %(slug)s
    make dev

See README.md for the rest.
"""


def replace(file, before, after):
    """Replace a whole line; a second run finds nothing to replace."""
    path = Path(file)
    text = path.read_bytes().decode("utf-8")
    path.write_bytes(text.replace(before + "\n", after + "\n").encode("utf-8"))


slug = ANSWERS["project_slug"]
description = json.dumps(ANSWERS["description"], ensure_ascii=False)
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
removal = Path("scripts/remove_part.py")
for part in ("example", "jobs"):
    wanted = str(ANSWERS["include_" + part]).strip().lower() in YES
    if not wanted and removal.exists():
        runpy.run_path(str(removal))["remove"](Path.cwd(), part)
sys.stdout.write(NEXT_STEPS % {"slug": slug})
