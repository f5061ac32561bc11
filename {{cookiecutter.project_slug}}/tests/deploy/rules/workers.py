"""Rules for workers: the Deployments alongside the API. They have probes, but serve no requests."""

from app.sizing.checks import GRACE_MARGIN_SECONDS
from tests.deploy.checking import (
    CONTAINER,
    POD_LABELS,
    Problems,
    expect,
    expect_between,
    rule,
    seconds_until_failure,
    selects,
    show,
)
from tests.deploy.deployed import POD, PROJECT, Deployed, Document, at, component, scaler_of
from tests.deploy.rules.network import ANTI_AFFINITY_TERM, MONITORING
from tests.deploy.rules.probes import MIN_STARTUP_SECONDS, MIN_TIMEOUT_SECONDS, PATHS

#: The fields of a Deployment that must select its own pods and no others.
SELECTORS = (
    "spec.selector.matchLabels",
    f"{POD}.topologySpreadConstraints.0.labelSelector.matchLabels",
    f"{ANTI_AFFINITY_TERM}.labelSelector.matchLabels",
)
#: How a worker starts: `python -m` and a module of the application.
MODULE_COMMAND_LENGTH = 3


def workers(d: Deployed) -> list[Document]:
    """Return the Deployments of all workers."""
    return [document for document in d.all("Deployment") if component(document) != "api"]


def services_of(d: Deployed, document: Document) -> list[Document]:
    """Return the Services of a worker, by its component."""
    return [each for each in d.all("Service") if component(each) == component(document)]


def name_of(document: Document) -> str:
    """Return the kind and the component of a document, which identify a worker in a message."""
    return f"{document['kind']} {component(document)}"


@rule
def workers_start_a_module_of_the_application(d: Deployed) -> Problems:
    for document in workers(d):
        command = d.container(document).get("command") or []
        module = PROJECT / str(command[-1]).replace(".", "/") if command else PROJECT
        is_module = command[:-1] == ["python", "-m"] and module.with_suffix(".py").exists()
        if not is_module or len(command) != MODULE_COMMAND_LENGTH:
            yield (
                f"{name_of(document)}: {CONTAINER}.command is {command}; set it to python, -m and "
                "a module of the application: a shell would not forward SIGTERM"
            )
        why = "the command has everything"
        yield from expect(document, CONTAINER, why, args=None, workingDir=None, lifecycle=None)


@rule
def worker_probes_request_their_own_path_on_the_metrics_port(d: Deployed) -> Problems:
    for document in workers(d):
        for probe, path in PATHS.items():
            place = f"{CONTAINER}.{probe}"
            why = f"the probes of {component(document)} are on the port of its metrics"
            yield from expect(document, f"{place}.httpGet", why, port="metrics", path=path)
            yield from expect(document, f"{place}.httpGet", why, scheme=None, host=None)
            why = "the startup probe covers the start, and the pod has the grace period"
            yield from expect(
                document, place, why, initialDelaySeconds=None, terminationGracePeriodSeconds=None
            )


@rule
def worker_probes_have_time(d: Deployed) -> Problems:
    for document in workers(d):
        for name in PATHS:
            probe = d.container(document).get(name) or {}
            path = f"{CONTAINER}.{name}.timeoutSeconds"
            period = probe.get("periodSeconds", 10)
            why = "a busy node misses 1 s, as do the checks of the dependencies"
            yield from expect_between(document, path, MIN_TIMEOUT_SECONDS, period, why)
        seconds = seconds_until_failure(d.container(document).get("startupProbe"))
        if seconds < MIN_STARTUP_SECONDS:
            yield (
                f"{name_of(document)}: startupProbe fails after {seconds} s (periodSeconds x "
                f"failureThreshold); set it to {MIN_STARTUP_SECONDS} s or more, for a slow node"
            )


@rule
def worker_metrics_are_on_the_port_of_the_settings(d: Deployed) -> Problems:
    for document in workers(d):
        ports = d.container(document).get("ports") or []
        found = {port.get("name"): port.get("containerPort") for port in ports}
        wanted = d.settings_of(document).metrics_bind.port
        if found != {"metrics": wanted}:
            yield (
                f"{name_of(document)}: {CONTAINER}.ports is {found}; "
                f"set it to metrics, on the port of METRICS_BIND, {wanted}"
            )


@rule
def workers_have_the_time_to_finish(d: Deployed) -> Problems:
    for document in workers(d):
        graceful = d.settings_of(document).graceful_timeout_seconds
        needed = graceful + GRACE_MARGIN_SECONDS
        grace = at(document, f"{POD}.terminationGracePeriodSeconds") or 0
        if grace < needed:
            yield (
                f"{name_of(document)}: {POD}.terminationGracePeriodSeconds is {grace}; set it to "
                f"GRACEFUL_TIMEOUT_SECONDS={graceful} + {GRACE_MARGIN_SECONDS} = {needed} or more, "
                "or SIGKILL ends what it handles"
            )


@rule
def workers_always_have_a_pod(d: Deployed) -> Problems:
    for document in workers(d):
        scaler = scaler_of(d, document)
        replicas = at(document, "spec.replicas")
        if scaler:
            why = "each apply would reset the number that the ScaledObject has set"
            yield from expect(document, "spec", why, replicas=None)
            maximum = at(scaler, "spec.maxReplicaCount") or 0
            why = "without a pod nothing is handled, published or scheduled"
            yield from expect_between(scaler, "spec.minReplicaCount", 1, maximum, why)
        elif not replicas:
            yield (
                f"{name_of(document)}: spec.replicas is {show(replicas)}; set it to 1 or more: "
                "no autoscaler has it as its target"
            )


@rule
def worker_selectors_match_their_own_pods_only(d: Deployed) -> Problems:
    for document in workers(d):
        places = [(document, path) for path in SELECTORS]
        places += [(service, "spec.selector") for service in services_of(d, document)]
        for place, path in places:
            found = [component(each) for each in d.pods if selects(at(place, path), _labels(each))]
            if found != [component(document)]:
                yield (
                    f"{name_of(place)}: {path} is {show(at(place, path))}; make it match the pods "
                    f"of {component(document)} only: it matches {found}"
                )


@rule
def worker_metrics_can_be_scraped(d: Deployed) -> Problems:
    """The ServiceMonitor selects all Services of the application."""
    for document in workers(d):
        ports = [at(service, "spec.ports.0.targetPort") for service in services_of(d, document)]
        if ports != ["metrics"]:
            yield (
                f"{name_of(document)}: the ports of its Services are {ports}; make one Service "
                f"with the port metrics, which the pods of {MONITORING} request"
            )


def _labels(document: Document) -> dict[str, str]:
    labels: dict[str, str] = at(document, POD_LABELS) or {}
    return labels
