"""Rules about the Dockerfile: it starts what the manifests expect, can migrate, and holds nothing else."""

import itertools
import re

from tests.deploy.deployed import Deployed
from tests.deploy.rules import CONTAINER, Faults, expect, rule

NEEDED = ("alembic.ini", "app", "gunicorn.conf.py", "migrations", "requirements.txt")
STRANGERS = re.compile(r"(^|/)(\.env\S*|\.git|tests|requirements-dev\.txt|\.)$")
INSTALLS = re.compile(r"\b(apk|apt|apt-get|pip|uv)\b")


@rule
def gunicorn_is_process_one_and_hears_the_signal(d: Deployed) -> Faults:
    for name, wanted in {"CMD": '["gunicorn"]', "ENTRYPOINT": "", "STOPSIGNAL": "SIGTERM"}.items():
        if (found := d.instruction(name)) != wanted:
            remedy = f"set it to {wanted}" if wanted else "remove it"
            yield f"Dockerfile: {name} is {found!r}; {remedy}: SIGTERM has to reach gunicorn, not a shell"


@rule
def the_pod_starts_what_the_image_says(d: Deployed) -> Faults:
    why = "the image's own CMD is gunicorn as process 1, which hears SIGTERM and reads gunicorn.conf.py"
    yield from expect(d.one("Deployment"), CONTAINER, why, command=None, args=None, workingDir=None)


@rule
def the_image_tells_its_health_without_a_shell_or_curl(d: Deployed) -> Faults:
    found, wanted = d.instruction("HEALTHCHECK"), 'CMD ["python", "-m", "app.serving.healthcheck"]'
    if not found.endswith(wanted):
        yield f"Dockerfile: HEALTHCHECK is {found!r}; end it with {wanted}"


@rule
def the_image_holds_the_service_its_migrations_and_no_more(d: Deployed) -> Faults:
    copies = [rest.split() for name, rest in itertools.chain(*d.stages) if name in {"COPY", "ADD"}]
    sources = {
        word.rstrip("/")
        for words in copies
        if not words[0].startswith("--from")
        for word in words[:-1]
    }
    for name in NEEDED:
        if name not in sources:
            yield f"Dockerfile: COPY {name} is missing; add it: the image needs it"
        if f"!{name}" not in d.dockerignore.split():
            yield f".dockerignore: !{name} is missing; add it: the image needs it"
    for name in sorted(source for source in sources if STRANGERS.search(source)):
        yield f"Dockerfile: COPY {name} is not for production; name what is needed"
    bases = {rest.split()[0] for stage in d.stages for name, rest in stage if name == "FROM"}
    if len(bases) != 1:
        yield f"Dockerfile: FROM names {sorted(bases)}; name one: what is compiled for one base is of no use on another"
    final = {tuple(words[1:]) for words in copies if words[0].startswith("--from")}
    for wanted in (("/opt/venv", "/opt/venv"), ("/app", "./")):
        if wanted not in final:
            yield f"Dockerfile: the last stage lacks COPY --from=builder {' '.join(wanted)}; add it"
    if not d.image_environment.get("PATH", "").startswith("/opt/venv/bin:"):
        yield f"Dockerfile: ENV PATH is {d.image_environment.get('PATH')}; begin it with /opt/venv/bin"
    for line in set(d.dockerignore.split()) - {f"!{name}" for name in NEEDED}:
        if line.startswith("!"):
            yield f".dockerignore: {line} lets in what the image does not need; remove it"
    if "*" not in d.dockerignore.split():
        yield ".dockerignore: the line * is missing; add it, so that only what is named gets into an image"


@rule
def the_last_stage_installs_nothing_and_the_first_checks_hashes(d: Deployed) -> Faults:
    commands = [[rest for name, rest in stage if name == "RUN"] for stage in d.stages]
    if len(d.stages) < 3 or any(INSTALLS.search(rest) for rest in commands[-1]):
        yield "Dockerfile: the last stage installs something; do that in a stage before it, and COPY --from"
    locked = [rest for rest in itertools.chain(*commands) if "requirements" in rest]
    if not locked or not all("--require-hashes" in rest for rest in locked):
        yield "Dockerfile: RUN installs requirements.txt without --require-hashes; add that"
