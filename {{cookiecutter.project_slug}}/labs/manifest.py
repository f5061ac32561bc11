"""Lab 1: five mistakes in one manifest. The deployment contract finds them, without kubectl."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from labs.picture import BAD, GREEN, Picture, bars
from labs.stage import Stage
from tests.deploy.checking import find_problems
from tests.deploy.deployed import Deployed
from tests.deploy.rules import capacity, pods, probes, secrets, shutdown

NUMBER = 1
TITLE = "five mistakes in one manifest: which ones do you find?"
#: Without the suffix of YAML, so that scanners of the repository do not report the mistakes.
MANIFEST = Path(__file__).with_name("manifest.yaml.txt")
PROJECT = Path(__file__).parents[1]
#: The rules of tests/deploy/rules that need no more than this file. `make k8s-check` has all.
RULES = (
    pods.pods_run_as_the_user_of_the_image,
    pods.containers_have_no_privileges,
    pods.pods_do_not_use_the_node,
    capacity.every_container_has_requests_and_limits,
    secrets.no_variable_is_a_secret,
    secrets.no_secret_is_in_git,
    secrets.every_variable_is_a_setting,
    secrets.pods_have_the_secret_files_that_they_need,
    shutdown.container_has_no_lifecycle_hooks,
    shutdown.grace_period_is_the_declared_one,
    probes.every_probe_exists,
    probes.probes_request_routes_of_the_application,
    probes.probes_request_their_own_path_on_the_http_port,
    probes.liveness_probe_lets_gunicorn_replace_a_stuck_worker,
)
Document = dict[str, Any]


class Fix(NamedTuple):
    """How a mistake is corrected: its name, and a function that changes the Deployment."""

    name: str
    apply: Callable[[Document], None]


def pod_of(deployment: Document) -> Document:
    """Return the pod of a Deployment."""
    pod: Document = deployment["spec"]["template"]["spec"]
    return pod


def run_as_a_user(deployment: Document) -> None:
    """Set the user of the image."""
    user = {"runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001}
    pod_of(deployment)["containers"][0]["securityContext"] |= user


def limit_resources(deployment: Document) -> None:
    """Limit CPU, memory and the files that the node keeps."""
    resources = pod_of(deployment)["containers"][0]["resources"]
    resources["limits"] = {"cpu": "1", "memory": "256Mi", "ephemeral-storage": "128Mi"}


def read_the_secret_from_its_file(deployment: Document) -> None:
    """Remove the variable: the file with the same name is already mounted."""
    del pod_of(deployment)["containers"][0]["env"]


def lengthen_the_grace_period(deployment: Document) -> None:
    """Leave time for the drain, for requests, and for the exit."""
    pod_of(deployment)["terminationGracePeriodSeconds"] = 60


def ask_only_the_process(deployment: Document) -> None:
    """Let liveness ask the process alone, and not the database."""
    probe = pod_of(deployment)["containers"][0]["livenessProbe"]
    probe["httpGet"]["path"] = "/health/live"


FIXES = (
    Fix("the container runs as root", run_as_a_user),
    Fix("no limits", limit_resources),
    Fix("a secret in the environment", read_the_secret_from_its_file),
    Fix("the grace period is too short", lengthen_the_grace_period),
    Fix("liveness asks the database", ask_only_the_process),
)


def problems_after(fixes: tuple[Fix, ...]) -> list[str]:
    """Return the problems that the contract finds after these fixes."""
    config, deployment = yaml.safe_load_all(MANIFEST.read_text())
    for fix in fixes:
        fix.apply(deployment)
    return list(check([config, deployment]))


def check(documents: list[Document]) -> Iterator[str]:
    """Yield each problem."""
    deployed = Deployed(
        overlay="prod",
        documents=documents,
        dockerfile=(PROJECT / "Dockerfile").read_text(),
        gunicorn_conf=(PROJECT / "gunicorn.conf.py").read_text(),
        dockerignore="",
        proxy="",
        compose="",
        compose_overrides={},
    )
    for rule in RULES:
        yield from find_problems(rule, deployed)


def run(stage: Stage) -> None:
    """Fix one mistake after the other, and check each time."""
    stage.say(f"{len(RULES)} rules read labs/manifest.yaml.txt.\n")
    left = problems_after(())
    counts = [len(left)]
    for problem in left:
        stage.say(f"  - {problem}")
    for number, fix in enumerate(FIXES, 1):
        left = problems_after(FIXES[:number])
        counts.append(len(left))
        stage.say(f"\n{number}. corrected: {fix.name}; problems left: {len(left)}")
    stage.picture = draw(counts)
    stage.claims.claim(f"with all five corrected, the rules find {counts[-1]} problems", not left)
    found = [fix for fix in FIXES if problems_after(tuple(each for each in FIXES if each != fix))]
    stage.claims.control(
        f"with one of the five left in, the rules complain: {len(found)} of {len(FIXES)} times",
        len(found) == len(FIXES),
    )


def draw(counts: list[int]) -> Picture:
    """Draw the number of problems after each correction."""
    picture = Picture(900, 330, "Problems that the deployment contract finds")
    labels = ["the manifest as it is", *(f"corrected: {fix.name}" for fix in FIXES)]
    rows = [
        (label, float(count), BAD if count else GREEN, f"{count} left" if number else str(count))
        for number, (label, count) in enumerate(zip(labels, counts, strict=True))
    ]
    bars(picture, (330, 60, 480, 250), rows)
    return picture
