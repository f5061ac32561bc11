"""The helpers of a deployment rule: a generator that yields each problem and how to fix it."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from app.sizing.resources import Resources
from tests.deploy.deployed import POD, Deployed, Document, UnreadableError, at, quantity

Problems = Iterator[str]
Rule = Callable[[Deployed], Problems]

#: Every rule, in the order of the modules.
REGISTERED: list[Rule] = []
CONTAINER = f"{POD}.containers.0"
POD_LABELS = "spec.template.metadata.labels"
MEGABYTE = 1 << 20


def rule(function: Rule) -> Rule:
    """Register a rule, so that every overlay is checked against it."""
    REGISTERED.append(function)
    return function


def find_problems(rule: Rule, deployed: Deployed) -> list[str]:
    """Return the problems that a rule finds. A part that cannot be read is one, too."""
    problems = []
    try:
        for problem in rule(deployed):
            problems.append(problem)  # noqa: PERF402 - those before an error count
    except UnreadableError as error:
        problems.append(str(error))
    return problems


def show(value: Any) -> str:
    """Return the text for a value in a message."""
    return "missing" if value is None else repr(value)


def expect(document: Document, root: str, why: str, **expected: Any) -> Problems:
    """Yield a problem for each field below `root` that differs from its expected value.

    Two underscores in a name are a dot of the path. None expects that the field is missing.
    """
    for name, value in expected.items():
        path = f"{root}.{name.replace('__', '.')}".removeprefix(".")
        found = at(document, path)
        if not _is_same(found, value):
            remedy = "remove it" if value is None else f"set it to {value!r}"
            yield f"{document['kind']}: {path} is {show(found)}; {remedy}: {why}"


def _is_same(found: Any, expected: Any) -> bool:
    """Compare two values. Unlike in Python, true is not 1."""
    return found == expected and isinstance(found, bool) is isinstance(expected, bool)


def expect_between(document: Document, path: str, minimum: int, maximum: int, why: str) -> Problems:
    """Yield a problem unless the value at a path is a whole number in these bounds."""
    found = at(document, path)
    if not isinstance(found, int) or not minimum <= found <= maximum:
        yield (
            f"{document['kind']}: {path} is {show(found)}; "
            f"set it between {minimum} and {maximum}: {why}"
        )


def seconds_until_failure(probe: Document | None) -> int:
    """Return the seconds after which a probe has failed, with the defaults of Kubernetes."""
    fields = probe or {}
    return int(fields.get("periodSeconds", 10) * fields.get("failureThreshold", 3))


def pod_count(value: Any, total: int) -> int:
    """Return a number of pods, given as a number or as a percentage, rounded up."""
    if isinstance(value, str):
        return math.ceil(int(value.rstrip("%")) * total / 100)
    return int(value or 0)


def quantity_at(document: Document, path: str) -> float:
    """Return the quantity at a path, in cores or bytes. Raises `UnreadableError`."""
    try:
        return quantity(at(document, path))
    except UnreadableError as error:
        msg = f"{document['kind']}: {path} {error}"
        raise UnreadableError(msg) from None


def api_resources(d: Deployed) -> Resources:
    """Return the CPU and memory limits of a pod of the API. Raises `UnreadableError`."""
    deployment = d.one("Deployment")
    cpus = quantity_at(deployment, f"{CONTAINER}.resources.limits.cpu")
    memory = quantity_at(deployment, f"{CONTAINER}.resources.limits.memory")
    return Resources(cpus, int(memory))


def selects(selector: Mapping[str, str] | None, labels: Mapping[str, str] | None) -> bool:
    """Return whether a selector matches these labels. An empty one matches everything."""
    return (selector or {}).items() <= (labels or {}).items()
