"""Rules for the probes: their routes, timeouts and thresholds."""

from collections.abc import Iterator

from starlette.routing import Match

from app.main import create_app
from tests.deploy.checking import (
    CONTAINER,
    Problems,
    expect,
    expect_between,
    rule,
    seconds_until_failure,
)
from tests.deploy.deployed import Deployed, Document, at

PATHS = {
    "startupProbe": "/health/startup",
    "livenessProbe": "/health/live",
    "readinessProbe": "/health/ready",
}
#: A busy node misses a timeout of 1 s, the default of Kubernetes.
MIN_TIMEOUT_SECONDS = 2
#: Time limit for a start on a slow node.
MIN_STARTUP_SECONDS = 20
#: The default of Kubernetes for `progressDeadlineSeconds`.
PROGRESS_DEADLINE_SECONDS = 600
#: From a worker's timeout until its replacement serves.
REPLACEMENT_SECONDS = 5


def existing_probes(d: Deployed) -> Iterator[tuple[str, Document]]:
    """Yield the name and the fields of each probe of the API."""
    for name in PATHS:
        probe = d.api.get(name)
        if probe:
            yield name, probe


@rule
def every_probe_exists(d: Deployed) -> Problems:
    for name, path in PATHS.items():
        if not d.api.get(name):
            yield f"Deployment: {CONTAINER}.{name} is missing; add one for {path}"


@rule
def probes_request_routes_of_the_application(d: Deployed) -> Problems:
    app = create_app(d.settings)
    for name, path in PATHS.items():
        scope = {"type": "http", "method": "GET", "path": path, "root_path": "", "headers": []}
        if not any(route.matches(scope)[0] is Match.FULL for route in app.routes):
            yield f"app/web/health.py: GET {path} is not a route; add it: {name} requests it"


@rule
def probes_request_their_own_path_on_the_http_port(d: Deployed) -> Problems:
    deployment = d.one("Deployment")
    for name, _ in existing_probes(d):
        place = f"{CONTAINER}.{name}"
        why = "each probe checks something else"
        yield from expect(deployment, place, why, httpGet__path=PATHS[name])
        why = "the kubelet sends plain HTTP to the pod's own port"
        http = {"httpGet__port": "http", "httpGet__scheme": None, "httpGet__host": None}
        yield from expect(deployment, place, why, **http)


@rule
def probes_leave_delays_and_grace_to_other_fields(d: Deployed) -> Problems:
    deployment = d.one("Deployment")
    for name, _ in existing_probes(d):
        place = f"{CONTAINER}.{name}"
        why = "the startup probe covers the start, and one success is enough"
        yield from expect(deployment, place, why, initialDelaySeconds=None, successThreshold=None)
        why = "a shutdown needs the grace period of the pod, whatever causes it"
        yield from expect(deployment, place, why, terminationGracePeriodSeconds=None)


@rule
def probe_timeouts_allow_for_a_busy_node(d: Deployed) -> Problems:
    deployment = d.one("Deployment")
    for name, probe in existing_probes(d):
        path = f"{CONTAINER}.{name}.timeoutSeconds"
        period = probe.get("periodSeconds", 10)
        why = "a busy node misses 1 s, and a probe must end before the next one starts"
        yield from expect_between(deployment, path, MIN_TIMEOUT_SECONDS, period, why)


@rule
def readiness_probe_waits_for_the_dependency_checks(d: Deployed) -> Problems:
    timeout = at(d.api, "readinessProbe.timeoutSeconds") or 1
    checks = d.settings.readiness_timeout_seconds
    if timeout <= checks:
        yield (
            f"Deployment: readinessProbe.timeoutSeconds is {timeout}; set it over "
            f"READINESS_TIMEOUT_SECONDS={checks:g}, or the response that lists the failed checks "
            "comes too late"
        )


@rule
def startup_probe_allows_a_slow_start(d: Deployed) -> Problems:
    deadline = at(d.one("Deployment"), "spec.progressDeadlineSeconds")
    deadline = deadline or PROGRESS_DEADLINE_SECONDS
    seconds = seconds_until_failure(d.api.get("startupProbe"))
    if not MIN_STARTUP_SECONDS <= seconds < deadline:
        yield (
            f"Deployment: startupProbe fails after {seconds} s (periodSeconds x failureThreshold); "
            f"set it to {MIN_STARTUP_SECONDS} s or more, for a slow node, and under "
            f"spec.progressDeadlineSeconds, {deadline} s"
        )


@rule
def liveness_probe_lets_gunicorn_replace_a_stuck_worker(d: Deployed) -> Problems:
    seconds = seconds_until_failure(d.api.get("livenessProbe"))
    replaced = d.settings.worker_timeout_seconds + REPLACEMENT_SECONDS
    if seconds <= replaced:
        yield (
            f"Deployment: livenessProbe fails after {seconds} s (periodSeconds x "
            f"failureThreshold); set it over WORKER_TIMEOUT_SECONDS + {REPLACEMENT_SECONDS} = "
            f"{replaced} s, or the kubelet restarts the pod before gunicorn replaces a stuck worker"
        )
