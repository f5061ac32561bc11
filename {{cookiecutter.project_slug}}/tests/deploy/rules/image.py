"""Rules for the Dockerfile: it starts gunicorn, can migrate, and has nothing else."""

import re
from collections.abc import Iterator

from tests.deploy.checking import CONTAINER, Problems, expect, rule
from tests.deploy.deployed import Deployed

COMMANDS = {"CMD": '["gunicorn"]', "ENTRYPOINT": "", "STOPSIGNAL": "SIGTERM"}
HEALTHCHECK = 'CMD ["python", "-m", "app.serving.healthcheck"]'
NEEDED = ("alembic.ini", "app", "gunicorn.conf.py", "migrations", "requirements.txt")
COPIED_FROM_BUILDER = (["/opt/venv", "/opt/venv"], ["/app", "./"])
NOT_FOR_PRODUCTION = re.compile(r"(^|/)(\.env\S*|\.git|tests|requirements-dev\.txt|\.)$")
INSTALLERS = re.compile(r"\b(apk|apt|apt-get|pip|uv)\b")


@rule
def gunicorn_is_process_one_and_receives_sigterm(d: Deployed) -> Problems:
    for name, expected in COMMANDS.items():
        found = d.instruction(name)
        if found != expected:
            remedy = f"set it to {expected}" if expected else "remove it"
            yield (
                f"Dockerfile: {name} is {found!r}; {remedy}: gunicorn must receive SIGTERM, "
                "not a shell"
            )


@rule
def pods_start_the_command_of_the_image(d: Deployed) -> Problems:
    why = "CMD of the image starts gunicorn as process 1, in the directory of gunicorn.conf.py"
    yield from expect(d.one("Deployment"), CONTAINER, why, command=None, args=None, workingDir=None)


@rule
def health_check_needs_neither_a_shell_nor_curl(d: Deployed) -> Problems:
    found = d.instruction("HEALTHCHECK")
    if not found.endswith(HEALTHCHECK):
        yield f"Dockerfile: HEALTHCHECK is {found!r}; end it with {HEALTHCHECK}"


@rule
def image_has_the_files_that_it_needs(d: Deployed) -> Problems:
    sources = set(_copied_sources(d))
    for name in NEEDED:
        if name not in sources:
            yield f"Dockerfile: COPY {name} is missing; add it: the image needs it"


@rule
def image_has_no_files_for_development(d: Deployed) -> Problems:
    for name in sorted(set(_copied_sources(d))):
        if NOT_FOR_PRODUCTION.search(name):
            yield f"Dockerfile: COPY {name} is not for production; copy only the needed files"


@rule
def last_stage_has_the_packages_and_the_application(d: Deployed) -> Problems:
    copied = [words[1:] for words in _copies(d) if words[0].startswith("--from")]
    for paths in COPIED_FROM_BUILDER:
        if paths not in copied:
            yield (
                f"Dockerfile: COPY --from=builder {' '.join(paths)} is missing; "
                "add it to the last stage"
            )
    path = d.image_environment.get("PATH", "")
    if not path.startswith("/opt/venv/bin:"):
        yield f"Dockerfile: ENV PATH is {path!r}; start it with /opt/venv/bin"


@rule
def all_stages_have_the_same_base(d: Deployed) -> Problems:
    # A stage of its FROM alone gives another base a name.
    used = [stage for stage in d.stages if len(stage) > 1]
    bases = {stage[0].arguments.split()[0] for stage in used if stage[0].name == "FROM"}
    if len(bases) != 1:
        yield (
            f"Dockerfile: FROM has {sorted(bases)}; use one base: files compiled for one do not "
            "run on another"
        )


@rule
def build_context_has_the_needed_files_only(d: Deployed) -> Problems:
    lines = d.dockerignore.split()
    if "*" not in lines:
        yield (
            ".dockerignore: the line * is missing; add it, so that only the listed files get into "
            "an image"
        )
    needed = [f"!{name}" for name in NEEDED]
    for line in needed:
        if line not in lines:
            yield f".dockerignore: {line} is missing; add it: the image needs it"
    for line in lines:
        if line.startswith("!") and line not in needed:
            yield f".dockerignore: {line} adds a file that the image does not need; remove it"


@rule
def last_stage_installs_nothing(d: Deployed) -> Problems:
    commands = [each.arguments for each in d.stages[-1] if each.name == "RUN"]
    # Before the first FROM there is a part without instructions, then builder and runtime.
    if len(d.stages) < 3 or any(INSTALLERS.search(command) for command in commands):
        yield (
            "Dockerfile: the last stage installs packages; install them in an earlier stage, and "
            "COPY --from it"
        )


@rule
def packages_are_installed_with_hashes(d: Deployed) -> Problems:
    commands = [command for command in _arguments(d, "RUN") if "requirements" in command]
    if not commands or not all("--require-hashes" in command for command in commands):
        yield "Dockerfile: RUN installs requirements.txt without --require-hashes; add it"


def _arguments(d: Deployed, name: str) -> Iterator[str]:
    """Yield the arguments of every such instruction, of all stages."""
    for stage in d.stages:
        for instruction in stage:
            if instruction.name == name:
                yield instruction.arguments


def _copies(d: Deployed) -> Iterator[list[str]]:
    """Yield the words of every COPY and ADD, of all stages."""
    for name in ("COPY", "ADD"):
        for arguments in _arguments(d, name):
            yield arguments.split()


def _copied_sources(d: Deployed) -> Iterator[str]:
    """Yield the sources of every COPY and ADD from the build context."""
    for words in _copies(d):
        if not words[0].startswith("--from"):
            for word in words[:-1]:
                yield word.rstrip("/")
