"""Run a lab of docs/workshop: `make lab L=sigterm`, or `python -m labs sigterm`.

Without a name, the labs are listed. `--all` runs each, one after the other. The results are written
to `.labs`, or to LABS_DIRECTORY: NAME.txt, NAME.svg and NAME.png. With WATCH=1 a local page shows
the service while the lab runs.
"""

import argparse
import ast
import importlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import labs
from labs.stage import LabError, Stage, open_stage


class Lab(NamedTuple):
    """A lab. It is imported when it runs: that of one lab does not need what another one does."""

    number: int
    name: str
    title: str

    def run(self, stage: Stage) -> None:
        """Import the module, and run it."""
        importlib.import_module(f"labs.{self.name}").run(stage)


def find_labs() -> dict[str, Lab]:
    """Return the labs by name, in the order of their numbers."""
    found = []
    for path in Path(labs.__path__[0]).glob("*.py"):
        constants = read_constants(path)
        if "NUMBER" in constants:
            found.append(Lab(constants["NUMBER"], path.stem, constants["TITLE"]))
    return {lab.name: lab for lab in sorted(found)}


def read_constants(path: Path) -> dict[str, Any]:
    """Return NUMBER and TITLE of a module, as far as it has them, without running it."""
    return {
        each.targets[0].id: ast.literal_eval(each.value)
        for each in ast.parse(path.read_text()).body
        if isinstance(each, ast.Assign)
        and isinstance(each.targets[0], ast.Name)
        and each.targets[0].id in {"NUMBER", "TITLE"}
    }


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def results_directory() -> Path:
    """Return the directory of the results, which exists then."""
    directory = Path(os.environ.get("LABS_DIRECTORY") or ".labs")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def run_lab(lab: Lab) -> bool:
    """Run a lab, write its results, and return whether its claims hold."""
    path = results_directory() / lab.name
    start = time.monotonic()
    say(f"Lab {lab.number}, {lab.name}: {lab.title}\n")
    try:
        with open_stage(say) as stage:
            lab.run(stage)
    except (LabError, SystemExit) as error:
        # Without Postgres, for example, scripts/dev_services.py exits.
        say(f"{lab.name}: {error}")
        return False
    write_results(stage, path)
    seconds = time.monotonic() - start
    say(f"\n{stage.claims.text}\n\n{path}.svg  {path}.png  {path}.txt  ({seconds:.0f} s)")
    return stage.claims.hold


def run_all(known: Sequence[Lab]) -> bool:
    """Run the labs one after the other, print a summary, and return whether all claims hold."""
    lines = []
    failed = 0
    for place, lab in enumerate(known, 1):
        start = time.monotonic()
        say(f"[{place} of {len(known)}] {'-' * 60}")
        is_held = run_lab(lab)
        failed += not is_held
        seconds = f"{time.monotonic() - start:.0f} s"
        outcome = "held" if is_held else "FAILED"
        lines.append(f"{lab.number}  {lab.name:13}{outcome:8}{seconds:>5}")
        say("")
    say("\n".join(lines))
    say(f"\n{len(known) - failed} of {len(known)} labs hold their claims.")
    return not failed


def write_results(stage: Stage, path: Path) -> None:
    """Write the text and the picture. A control that fails is not an error: see `Claims`."""
    text = "\n".join([*stage.said, "", stage.claims.text])
    path.with_suffix(".txt").write_text(text + "\n")
    if stage.picture:
        stage.picture.save(path)


def main() -> int:
    """Run the named labs; return 1 if a claim is broken, or a control did not fail."""
    parser = argparse.ArgumentParser(prog="python -m labs", description=__doc__)
    parser.add_argument("name", nargs="?", help="the lab to run")
    parser.add_argument("--all", action="store_true", help="run every lab")
    parser.add_argument("--list", action="store_true", help="list the labs")
    arguments = parser.parse_args()
    known = find_labs()
    if arguments.all:
        return int(not run_all(list(known.values())))
    if arguments.list or not arguments.name:
        for lab in known.values():
            say(f"{lab.number}  {lab.name:13}{lab.title}")
        return 0
    if arguments.name not in known:
        parser.error(f"{arguments.name}: no such lab; choose one of {', '.join(known)}")
    return int(not run_lab(known[arguments.name]))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
