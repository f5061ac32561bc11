"""Lab 6: a secret in the environment, and the same secret in a file. Where does it leak?"""

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from labs.picture import BAD, GREEN, TEXT, WHITE, Picture
from labs.stage import PROJECT, Instance, LabError, Stage

NUMBER = 6
TITLE = "a secret in the environment or in a file: where does it leak?"
SECRETS = ("DATABASE_URL", "REDIS_URL")


def run(stage: Stage) -> None:
    """Run the service both ways, and look for its password."""
    url = stage.postgres.url
    password = urlsplit(url).password or ""
    in_files = {"SECRETS_DIR": str(write_files(stage)), **dict.fromkeys(SECRETS, "")}
    environment = leaks(stage, password, {})
    files = leaks(stage, password, in_files)
    stage.say(f"{'place':38}{'environment':14}file")
    for place, is_leak in environment.items():
        stage.say(f"{place:38}{show(is_leak):14}{show(files[place])}")
    stage.picture = draw(environment, files)
    number = len(environment)
    stage.claims.claim(
        f"the password in a file is in {sum(files.values())} of {number} places, and the service is"
        " ready",
        not any(files.values()),
    )
    stage.claims.control(
        f"the password in the environment is in {sum(environment.values())} of {number} places",
        all(environment.values()),
    )


def show(is_leak: bool) -> str:
    """Return the word for a result."""
    return "LEAKED" if is_leak else "not there"


def write_files(stage: Stage) -> Path:
    """Write a file for each secret, as Kubernetes mounts them; return their directory."""
    directory = stage.directory / "secrets"
    directory.mkdir(mode=0o700)
    for name, url in zip(SECRETS, (stage.postgres.url, stage.redis_url), strict=True):
        file = directory / name.lower()
        file.touch(mode=0o400)
        file.chmod(0o600)
        file.write_text(url)
        file.chmod(0o400)
    return directory


def leaks(stage: Stage, password: str, settings: Mapping[str, str]) -> dict[str, bool]:
    """Start the service with these settings; return whether each place has the password."""
    instance = stage.serve("", port=0, ports=None, options="", **settings)
    instance.wait_until_ready()
    places = dict(places_of(instance))
    instance.kill()
    variables = stage.variables(**settings)
    places["a crash report with the environment"] = output_of("crash", variables)
    places["a program that the service starts"] = output_of("child", variables)
    return {place: password in text for place, text in places.items()}


def places_of(instance: Instance) -> Iterator[tuple[str, str]]:
    """Yield the places where others see a running process, with their texts."""
    processes = instance.family()
    if shutil.which("ps"):
        command = ["ps", "eww", *(str(each.pid) for each in processes)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        yield "ps eww", done.stdout
    texts = [process.environ() for process in processes]
    yield "/proc/PID/environ of each process", str(texts)


def output_of(mode: str, variables: Mapping[str, str]) -> str:
    """Return the output of the leaky program. Raises `LabError` if it fails."""
    command = [sys.executable, "-m", "labs.leaky", mode]
    done = subprocess.run(
        command, cwd=PROJECT, env=variables, capture_output=True, text=True, check=False
    )
    if done.returncode:
        msg = f"labs.leaky failed: {done.stderr.strip().splitlines()[-1]}"
        raise LabError(msg)
    return done.stdout


def draw(environment: Mapping[str, bool], files: Mapping[str, bool]) -> Picture:
    """Draw a table: a row for each place."""
    picture = Picture(900, 110 + 48 * len(environment), "Where is the database password?")
    columns = (("in the environment", 420, environment), ("in a file", 660, files))
    for title, x, _ in columns:
        picture.text(x, 66, title, size=15, is_bold=True)
    for number, place in enumerate(environment):
        y = 110 + 48 * number
        picture.text(24, y, place, size=15)
        for _, x, results in columns:
            picture.box(x, y - 24, 200, 38, BAD if results[place] else GREEN)
            picture.text(x + 100, y, show(results[place]), size=15, anchor="middle", color=WHITE)
    picture.line([(24, 78), (876, 78)], TEXT, 1)
    return picture
