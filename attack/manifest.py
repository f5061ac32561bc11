"""The parts of a rendered overlay that cluster.py follows; times are in seconds."""

from dataclasses import dataclass, replace
from typing import Any

from tests.deploy import deployed

from prerequisites import missing


@dataclass(frozen=True)
class Probe:
    """An HTTP probe, with the defaults of Kubernetes."""

    path: str
    port: int
    delay: float = 0
    period: float = 10
    timeout: float = 1
    failures: int = 3
    successes: int = 1

    @property
    def notices_within(self) -> float:
        """The longest time until a container that no longer responds counts as failed."""
        return self.period * self.failures + self.timeout


@dataclass(frozen=True)
class Manifest:
    """A Deployment with its disruption budget, environment and secrets."""

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
    """Render an overlay and read it; `secrets` are the contents of its secret files.

    Skips the test without a tool that renders it.
    """
    if not deployed.kustomize():
        missing("kustomize is missing, and so is kubectl: install one of the two")
    rendered = deployed.read(overlay)
    deployment = rendered.one("Deployment")
    container = rendered.api
    spec = deployment["spec"]
    pod = spec["template"]["spec"]
    rolling = spec["strategy"]["rollingUpdate"]
    budget = rendered.one("PodDisruptionBudget")["spec"]
    service = rendered.one("Service")["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert service["selector"].items() <= labels.items(), "the Service selects no pod"

    replicas = spec.get("replicas")
    if not replicas:
        replicas = rendered.one("HorizontalPodAutoscaler")["spec"]["minReplicas"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    serving_port = next(port["targetPort"] for port in service["ports"] if port["name"] == "http")
    # In a container, the service reads its number of CPUs from the cgroup.
    cpus = deployed.quantity(container["resources"]["limits"]["cpu"])
    return Manifest(
        replicas=replicas,
        surge=rolling["maxSurge"],
        unavailable=rolling["maxUnavailable"],
        min_ready=spec["minReadySeconds"],
        progress_deadline=spec["progressDeadlineSeconds"],
        disruptions=budget["maxUnavailable"],
        evicts_unready=budget.get("unhealthyPodEvictionPolicy") == "AlwaysAllow",
        grace=pod["terminationGracePeriodSeconds"],
        pre_stop=deployed.at(container, "lifecycle.preStop.sleep.seconds") or 0,
        ports=ports,
        serving_port=ports[serving_port],
        startup=_probe(container["startupProbe"], ports),
        liveness=_probe(container["livenessProbe"], ports),
        readiness=_probe(container["readinessProbe"], ports),
        env={"WEB_CONCURRENCY": str(max(1, int(cpus)))} | rendered.environment(deployment),
        secrets={name: secrets[name] for name in rendered.secrets(deployment)},
    )


PROBE_FIELDS = {
    "initialDelaySeconds": "delay",
    "periodSeconds": "period",
    "timeoutSeconds": "timeout",
    "failureThreshold": "failures",
    "successThreshold": "successes",
}


def _probe(probe: dict[str, Any], ports: dict[str, int]) -> Probe:
    """Return a probe of the manifest. Raises `KeyError` for an unsupported key."""
    fields = {PROBE_FIELDS[name]: value for name, value in probe.items() if name != "httpGet"}
    request = probe["httpGet"]
    return Probe(request["path"], ports[request["port"]], **fields)
