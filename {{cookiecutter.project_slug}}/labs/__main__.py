"""Run a lab of docs/workshop: `make lab L=sigterm`, or `python -m labs sigterm`.

Without a name, the labs are listed. `--all` runs each, one after the other. The results are written
to `.labs`, or to LABS_DIRECTORY: NAME.txt, NAME.svg and NAME.png. With WATCH=1 a local page shows
the service while the lab runs.
"""

import argparse
import importlib
import os
import pkgutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import labs
from labs.stage import LabError, Stage, open_stage


def find_labs() -> dict[str, ModuleType]:
    """Return the labs by name, in the order of their numbers."""
    names = [module.name for module in pkgutil.iter_modules(labs.__path__)]
    modules = [importlib.import_module(f"labs.{name}") for name in names if name != "__main__"]
    found = [module for module in modules if hasattr(module, "NUMBER")]
    found.sort(key=lambda module: int(module.NUMBER))
    return {module.__name__.removeprefix("labs."): module for module in found}


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def results_directory() -> Path:
    """Return the directory of the results, which exists then."""
    directory = Path(os.environ.get("LABS_DIRECTORY") or ".labs")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def run_lab(name: str, module: ModuleType) -> bool:
    """Run a lab, write its results, and return whether its claims hold."""
    path = results_directory() / name
    start = time.monotonic()
    say(f"Lab {module.NUMBER}, {name}: {module.TITLE}\n")
    try:
        with open_stage(say) as stage:
            module.run(stage)
    except (LabError, SystemExit) as error:
        # Without Postgres, for example, scripts/dev_services.py exits.
        say(f"{name}: {error}")
        return False
    write_results(stage, path)
    seconds = time.monotonic() - start
    say(f"\n{stage.claims.text}\n\n{path}.svg  {path}.png  {path}.txt  ({seconds:.0f} s)")
    return stage.claims.hold


def run_all(known: Mapping[str, ModuleType]) -> bool:
    """Run the labs one after the other, print a summary, and return whether all claims hold."""
    lines = []
    failed = 0
    for number, (name, module) in enumerate(known.items(), 1):
        start = time.monotonic()
        say(f"[{number} of {len(known)}] " + "-" * 60)
        is_held = run_lab(name, module)
        failed += not is_held
        seconds = f"{time.monotonic() - start:.0f} s"
        lines.append(f"{module.NUMBER}  {name:13}{'held' if is_held else 'FAILED':8}{seconds:>5}")
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
        return int(not run_all(known))
    if arguments.list or not arguments.name:
        for name, module in known.items():
            say(f"{module.NUMBER}  {name:13}{module.TITLE}")
        return 0
    if arguments.name not in known:
        parser.error(f"{arguments.name}: no such lab; choose one of {', '.join(known)}")
    return int(not run_lab(arguments.name, known[arguments.name]))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
