"""What a rule is: a function that yields, for each fault, where it is, what stands there, and what to change."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from app.sizing.resources import Resources
from tests.deploy.deployed import Deployed, Document, UnreadableError, at, quantity

Faults = Iterator[str]
Rule = Callable[[Deployed], Faults]
RULES: list[Rule] = []

POD = "spec.template.spec"
CONTAINER = f"{POD}.containers.0"
LABELS = "spec.template.metadata.labels"


def rule(function: Rule) -> Rule:
    """Add a rule to those that every overlay is held to."""
    RULES.append(function)
    return function


def faults(rule: Rule, deployed: Deployed) -> list[str]:
    """Return what breaks a rule; what cannot be judged is a fault too."""
    found = []
    try:
        for fault in rule(deployed):
            found.append(fault)  # noqa: PERF402 - those before an error count
    except UnreadableError as error:
        found.append(str(error))
    return found


def expect(document: Document, root: str, why: str, **wanted: Any) -> Faults:
    """Yield a fault for each field below `root` that does not hold what is wanted; None is a field that is not there.

    Fields are named by their path, with two underscores for a dot.
    """
    for name, value in wanted.items():
        path = ".".join(part for part in (root, *name.split("__")) if part)
        if (found := at(document, path)) != value or isinstance(found, bool) is not isinstance(
            value, bool
        ):
            remedy = f"set it to {value!r}" if value is not None else "remove it"
            yield f"{document['kind']}: {path} is {found!r}; {remedy}: {why}"


def bounded(document: Document, path: str, least: int, most: int, why: str) -> Faults:
    """Yield a fault unless a number stands at a path, and is in these bounds."""
    if not isinstance(found := at(document, path), int) or not least <= found <= most:
        yield f"{document['kind']}: {path} is {found!r}; set it between {least} and {most}: {why}"


def budget(probe: Document | None) -> int:
    """Return the seconds after which a probe has failed, with the defaults of Kubernetes."""
    return int((probe or {}).get("periodSeconds", 10) * (probe or {}).get("failureThreshold", 3))


def share(value: Any, whole: int) -> int:
    """Return a number of pods that is given as a number or as a percentage, rounded up."""
    return -(-int(value.rstrip("%")) * whole // 100) if isinstance(value, str) else int(value or 0)


def limits(d: Deployed) -> Resources:
    """Return the CPUs and the memory that a pod of the API may use."""
    cpus, memory = (quantity(at(d.api, f"resources.limits.{name}")) for name in ("cpu", "memory"))
    return Resources(cpus, int(memory))


def matches(selector: Mapping[str, str] | None, labels: Mapping[str, str] | None) -> bool:
    """Tell whether a selector takes an object with these labels. An empty one takes everything."""
    return (selector or {}).items() <= (labels or {}).items()
