"""Write a new feature into the project: `python -m scripts.feature PLURAL [SINGULAR]`.

Everything is checked and rendered first, then written; an error leaves the project as it was.
"""

import contextlib
import subprocess
import sys
from pathlib import Path

from scripts.feature.edits import NoPlaceError
from scripts.feature.names import InvalidNameError, Names, parse
from scripts.feature.plan import PROJECT, FeatureError, plan

USAGE = "N is missing: make feature N=orders, or make feature N=people S=person"
DONE = """
{plural} has POST /{plural}, GET /{plural} and GET /{plural}/{{{singular}_id}}.
Next: change the fields of {class_name} and New{class_name} in app/{plural}/schemas.py, with
app/{plural}/repository.py and the migration, then run

    make test T=tests/{plural}

docs/first-feature.md continues from here, step by step.
"""


def write(files: dict[Path, str]) -> None:
    """Write all files and format them, or none: an error restores and deletes what was written."""
    before: dict[Path, bytes | None] = {}
    directories: list[Path] = []
    try:
        for name, text in files.items():
            path = PROJECT / name
            if not path.parent.exists():
                directories.append(path.parent)
                path.parent.mkdir()
            before[path] = path.read_bytes() if path.exists() else None
            _replace(path, text)
        _format([str(name) for name in files if name.suffix == ".py"])
    except BaseException:
        for path, content in before.items():
            with contextlib.suppress(OSError):
                path.write_bytes(content) if content is not None else path.unlink()
        for directory in directories:
            with contextlib.suppress(OSError):
                directory.rmdir()
        raise


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
            raise FeatureError(f"nothing was written: ruff {command[0]} failed: {reason}")


def _replace(link: Path, text: str) -> None:
    """Write a file in one step, with the line ends that it has."""
    path = link.resolve()
    has_crlf = path.exists() and b"\r\n" in path.read_bytes()
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_bytes((text.replace("\n", "\r\n") if has_crlf else text).encode())
        if path.exists():
            temporary.chmod(path.stat().st_mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments: list[str]) -> None:
    """Write the feature and print the next steps. Exits with one line if that is not possible."""
    if not arguments or not arguments[0]:
        sys.exit(USAGE)
    try:
        names = parse(*arguments)
        files = plan(names)
        write(files)
    except (InvalidNameError, NoPlaceError, FeatureError) as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"nothing was written: {error}")
    for name in files:
        sys.stdout.write(f"{name.as_posix()}\n")
    _print_next_steps(names)


def _print_next_steps(names: Names) -> None:
    values = {"plural": names.plural, "singular": names.singular, "class_name": names.class_name}
    sys.stdout.write(DONE.format(**values))


if __name__ == "__main__":
    main(sys.argv[1:])
