"""What a rendered overlay says, as far as cluster.py obeys it; all times are in seconds."""

import os
from dataclasses import dataclass, replace
from typing import Any

import pytest
from tests.deploy import deployed


@dataclass(frozen=True)
class Probe:
    """A probe over HTTP, with the defaults of Kubernetes."""

    path: str
    port: int
    delay: float = 0
    period: float = 10
    timeout: float = 1
    failures: int = 3
    successes: int = 1

    @property
    def notices_within(self) -> float:
        """The longest until a container that answers no more counts as failed."""
        return self.period * self.failures + self.timeout


@dataclass(frozen=True)
class Manifest:
    """A Deployment with its budget for disruptions, its environment and its secrets."""

    replicas: int
    surge: int
    unavailable: int
    min_ready: float
    progress_deadline: float
    disruptions: int
    evicts_unready: bool
    grace: float
    pre_stop: float
    ports: dict[str, int]
    serving_port: int
    startup: Probe
    liveness: Probe
    readiness: Probe
    env: dict[str, str]
    secrets: dict[str, str]

    def but(self, **env: str) -> "Manifest":
        """Return another release, with other settings."""
        return replace(self, env=self.env | env)


def read(overlay: str, secrets: dict[str, str]) -> Manifest:
    """Read an overlay; `secrets` are what its files will hold. Without a tool to render it the test is skipped."""
    if not deployed.kustomize():
        text = "kustomize is missing, and so is kubectl: install one of the two"
        pytest.fail(f"{text}; CI=true makes that a failure") if os.environ.get(
            "CI"
        ) == "true" else pytest.skip(text)
    rendered = deployed.read(overlay)
    deployment, container = rendered.one("Deployment"), rendered.api
    spec, budget = deployment["spec"], rendered.one("PodDisruptionBudget")["spec"]
    service = rendered.one("Service")["spec"]
    assert service["selector"].items() <= spec["template"]["metadata"]["labels"].items(), (
        "the Service selects no pod"
    )
    rolling, pod = spec["strategy"]["rollingUpdate"], spec["template"]["spec"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    # The service would read its number of CPUs from the control group.
    cpus = deployed.quantity(container["resources"]["limits"]["cpu"])
    return Manifest(
        replicas=spec.get("replicas")
        or rendered.one("HorizontalPodAutoscaler")["spec"]["minReplicas"],
        surge=rolling["maxSurge"],
        unavailable=rolling["maxUnavailable"],
        min_ready=spec["minReadySeconds"],
        progress_deadline=spec["progressDeadlineSeconds"],
        disruptions=budget["maxUnavailable"],
        evicts_unready=budget.get("unhealthyPodEvictionPolicy") == "AlwaysAllow",
        grace=pod["terminationGracePeriodSeconds"],
        pre_stop=deployed.at(container, "lifecycle.preStop.sleep.seconds") or 0,
        ports=ports,
        serving_port=ports[
            next(port["targetPort"] for port in service["ports"] if port["name"] == "http")
        ],
        startup=_probe(container["startupProbe"], ports),
        liveness=_probe(container["livenessProbe"], ports),
        readiness=_probe(container["readinessProbe"], ports),
        env={"WEB_CONCURRENCY": str(max(1, int(cpus)))} | rendered.environment(deployment),
        secrets={name: secrets[name] for name in rendered.secrets(deployment)},
    )


def _probe(text: dict[str, Any], ports: dict[str, int]) -> Probe:
    names = {
        "initialDelaySeconds": "delay",
        "periodSeconds": "period",
        "timeoutSeconds": "timeout",
        "failureThreshold": "failures",
        "successThreshold": "successes",
    }
    path, port = text["httpGet"]["path"], ports[text["httpGet"]["port"]]
    return Probe(
        path, port, **{names[name]: value for name, value in text.items() if name != "httpGet"}
    )
