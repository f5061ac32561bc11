"""Write a new feature into the project: `python -m scripts.feature PLURAL [SINGULAR]`.

Everything is checked and rendered first, then written; an error leaves the project as it was.
"""

import subprocess
import sys

from scripts.feature.edits import NoPlaceError
from scripts.feature.names import InvalidNameError, Names, parse
from scripts.feature.plan import plan
from scripts.project_files import PROJECT, ProjectError, written

USAGE = "N is missing: make feature N=orders, or make feature N=people S=person"
DONE = """
{plural} has POST /{plural}, GET /{plural} and GET {item}.
Next: change the fields of {class_name} and New{class_name} in app/{plural}/schemas.py, with
app/{plural}/repository.py and the migration, then run

    make test T=tests/{plural}

docs/first-feature.md continues from here, step by step.
"""


def _format(names: list[str]) -> None:
    """Sort the imports, whose order follows from the name, and format, as the project does."""
    for command in (["check", "--select", "I", "--fix", "--exit-zero"], ["format"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--quiet", *names],
            capture_output=True,
            check=False,
            cwd=PROJECT,
        )
        if done.returncode:
            reason = done.stderr.decode().strip().partition("\n")[0]
            raise ProjectError(f"nothing was written: ruff {command[0]} failed: {reason}")


def main(arguments: list[str]) -> None:
    """Write the feature and print the next steps. Exits with one line if that is not possible."""
    if not arguments or not arguments[0]:
        sys.exit(USAGE)
    try:
        names = parse(*arguments)
        files = plan(names)
        with written(PROJECT, files):
            _format([name for name in files if name.endswith(".py")])
    except (InvalidNameError, NoPlaceError, ProjectError) as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"nothing was written: {error}")
    for name in files:
        sys.stdout.write(f"wrote {name}\n")
    _print_next_steps(names)


def _print_next_steps(names: Names) -> None:
    # Not in the text: doubled braces are the template's.
    item = f"/{names.plural}/" + "{" + f"{names.singular}_id" + "}"
    text = DONE.format(plural=names.plural, item=item, class_name=names.class_name)
    sys.stdout.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
