"""Rules for shutdown: the drain and the graceful timeout fit into the termination grace period."""

from tests.deploy.checking import CONTAINER, Problems, expect, rule, seconds_until_failure
from tests.deploy.deployed import POD, Deployed

#: The part of the drain in which the endpoint's removal reaches the load balancers.
ENDPOINT_REMOVAL_SECONDS = 2
#: Variables of gunicorn.conf.py that must have the value of a setting.
GUNICORN_SETTINGS = {
    "timeout": "worker_timeout_seconds",
    "graceful_timeout": "graceful_timeout_seconds",
    "keepalive": "keepalive_seconds",
}


@rule
def container_has_no_lifecycle_hooks(d: Deployed) -> Problems:
    why = "the service drains itself; a preStop only adds to that"
    yield from expect(d.one("Deployment"), CONTAINER, why, lifecycle=None)


@rule
def grace_period_is_the_declared_one(d: Deployed) -> Problems:
    grace = d.settings.termination_grace_seconds
    why = "TERMINATION_GRACE_SECONDS in the ConfigMap declares it"
    yield from expect(d.one("Deployment"), POD, why, terminationGracePeriodSeconds=grace)


@rule
def pod_becomes_unready_before_the_drain_ends(d: Deployed) -> Problems:
    unready = seconds_until_failure(d.api.get("readinessProbe"))
    latest = d.settings.drain_seconds - ENDPOINT_REMOVAL_SECONDS
    if unready > latest:
        yield (
            f"Deployment: readinessProbe fails after {unready} s (periodSeconds x "
            f"failureThreshold); set it to DRAIN_SECONDS - {ENDPOINT_REMOVAL_SECONDS} = "
            f"{latest:g} s or less, or requests arrive after the drain"
        )


@rule
def gunicorn_uses_the_timeouts_of_the_settings(d: Deployed) -> Problems:
    for variable, name in GUNICORN_SETTINGS.items():
        found = d.gunicorn[variable]
        if found != getattr(d.settings, name):
            yield (
                f"gunicorn.conf.py: {variable} is {found}; set it to settings.{name}, "
                "which the other rules check"
            )
