"""Deliberate regressions of a deployment, each with a text that a deployment rule has to report.

The interpreter of the service runs this module in the service's directory. It then checks every
regression against the deployment rules there, tests/deploy, and prints the problems as JSON.
"""

import copy
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

#: The fields of `Deployed`, by name.
Fields = dict[str, Any]
Change = Callable[[Fields], None]

POD = "spec.template.spec"
CONTAINER = f"{POD}.containers.0"
NAME_LABEL = "app.kubernetes.io/name"
COMPONENT_LABEL = "app.kubernetes.io/component"
BEHAVIOR = "spec.advanced.horizontalPodAutoscalerConfig.behavior"


class Mutation(NamedTuple):
    """One regression: its description, a text that a problem has to contain, and its changes."""

    description: str
    expected: str
    changes: tuple[Change, ...]


def mutation(description: str, expected: str, *changes: Change) -> Mutation:
    """Return a regression that these changes make."""
    return Mutation(description, expected, changes)


def find(fields: Fields, kind: str) -> dict[str, Any]:
    """Return the first document of a kind."""
    for document in fields["documents"]:
        if document["kind"] == kind:
            found: dict[str, Any] = document
            return found
    msg = f"no document of kind {kind}"
    raise AssertionError(msg)


def find_of(fields: Fields, kind: str, component: str) -> dict[str, Any]:
    """Return the document of a kind that has this component label."""
    for document in fields["documents"]:
        labels = document["metadata"].get("labels", {})
        if document["kind"] == kind and labels.get(COMPONENT_LABEL) == component:
            found: dict[str, Any] = document
            return found
    msg = f"no document of kind {kind} of {component}"
    raise AssertionError(msg)


def put(kind: str, path: str, value: object, component: str = "") -> Change:
    """Set a field such as `spec.ports.0.name` in the first document of a kind, or of a component.

    None removes the field, and `-` as the last key appends to a list.
    """

    def change(fields: Fields) -> None:
        place: Any = find_of(fields, kind, component) if component else find(fields, kind)
        *keys, last = path.split(".")
        for key in keys:
            place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
        if last == "-":
            place.append(value)
            return
        index = int(last) if isinstance(place, list) else last
        if value is None:
            del place[index]
        else:
            place[index] = value

    return change


def label(kind: str, path: str, name: str, value: str | None) -> Change:
    """Change a label in the first document of a kind; None removes it. Its name has dots."""

    def change(fields: Fields) -> None:
        labels = find(fields, kind)
        for key in path.split("."):
            labels = labels[key]
        del labels[name]
        if value is not None:
            labels[name] = value

    return change


def setting(name: str, value: str) -> Change:
    """Set a variable of the ConfigMap."""
    return put("ConfigMap", f"data.{name}", value)


def text(field: str, before: str, after: str) -> Change:
    """Replace a text that occurs once in a file of the project, named as in `Deployed`."""

    def change(fields: Fields) -> None:
        occurrences = fields[field].count(before)
        assert occurrences == 1, f"{before!r} occurs {occurrences} times in {field}, not once"
        fields[field] = fields[field].replace(before, after)

    return change


def api_in_compose(line: str) -> Change:
    """Replace the environment of the API in compose.yaml by another line."""
    rest = "\n      FORWARDED_ALLOW_IPS"
    return text("compose", f"ENVIRONMENT: staging{rest}", f"{line}{rest}")


def rabbitmq(before: str, after: str) -> Change:
    """Replace a text that occurs once in the override of compose.yaml for RabbitMQ."""

    def change(fields: Fields) -> None:
        overrides = {"text": fields["compose_overrides"]["compose.rabbitmq.yaml"]}
        text("text", before, after)(overrides)
        fields["compose_overrides"]["compose.rabbitmq.yaml"] = overrides["text"]

    return change


def add(document: dict[str, Any]) -> Change:
    """Add a document."""

    def change(fields: Fields) -> None:
        fields["documents"].append(document)

    return change


def add_secret(**values: str) -> Change:
    """Add the Secret that the pods mount, as an overlay for development has it."""

    def change(fields: Fields) -> None:
        pods = find(fields, "Deployment")
        volumes = pods["spec"]["template"]["spec"]["volumes"]
        (name,) = [
            each["projected"]["sources"][0]["secret"]["name"]
            for each in volumes
            if "projected" in each
        ]
        metadata = {"name": name, "namespace": pods["metadata"]["namespace"]}
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": values}
        fields["documents"].append(secret)

    return change


def close_port(number: int) -> Change:
    """Remove a port from all network policies."""

    def change(fields: Fields) -> None:
        for document in fields["documents"]:
            if document["kind"] == "NetworkPolicy":
                for entry in document["spec"].get("egress", []):
                    entry["ports"] = [each for each in entry["ports"] if each["port"] != number]

    return change


def share_secret_with_keda() -> Change:
    """Let KEDA use the Secret that the pods mount."""

    def change(fields: Fields) -> None:
        login = find(fields, "TriggerAuthentication")
        for target in login["spec"]["secretTargetRef"]:
            target["name"] = target["name"].replace("-keda", "-secrets")

    return change


def remove(kind: str) -> Change:
    """Remove the documents of a kind."""

    def change(fields: Fields) -> None:
        documents = fields["documents"]
        fields["documents"] = [document for document in documents if document["kind"] != kind]

    return change


deployment = partial(put, "Deployment")
job = partial(put, "Job")
service = partial(put, "Service")
hpa = partial(put, "HorizontalPodAutoscaler")
pdb = partial(put, "PodDisruptionBudget")
policy = partial(put, "NetworkPolicy")


def pod(path: str, value: object) -> Change:
    """Set a field of the API's pods."""
    return deployment(f"{POD}.{path}", value)


def api(path: str, value: object) -> Change:
    """Set a field of the API's container."""
    return deployment(f"{CONTAINER}.{path}", value)


def migrate(path: str, value: object) -> Change:
    """Set a field of the migration's container."""
    return job(f"{CONTAINER}.{path}", value)


def consumer(path: str, value: object) -> Change:
    """Set a field of the consumer's container."""
    return put("Deployment", f"{CONTAINER}.{path}", value, "consumer")


jobs = partial(put, "Deployment", component="jobs")
keda = partial(put, "ScaledObject", component="jobs")


def jobs_container(path: str, value: object) -> Change:
    """Set a field of the container of the workers that do the jobs."""
    return jobs(f"{CONTAINER}.{path}", value)


MUTATIONS = [
    # probes
    mutation("startup probe missing", "startupProbe", api("startupProbe", None)),
    mutation("liveness probe missing", "livenessProbe", api("livenessProbe", None)),
    mutation("readiness probe missing", "readinessProbe", api("readinessProbe", None)),
    mutation("probe path is not a route", "/readyz", api("readinessProbe.httpGet.path", "/readyz")),
    mutation(
        "liveness probe checks the dependencies",
        "livenessProbe.httpGet.path",
        api("livenessProbe.httpGet.path", "/health/ready"),
    ),
    mutation("probe port by number", "httpGet.port", api("startupProbe.httpGet.port", 8000)),
    mutation(
        "probe port does not exist", "httpGet.port", api("readinessProbe.httpGet.port", "web")
    ),
    mutation(
        "readiness probe timeout too short",
        "readinessProbe.timeoutSeconds",
        api("readinessProbe.timeoutSeconds", 1),
    ),
    mutation(
        "liveness probe fails before a stuck worker is replaced",
        "livenessProbe",
        api("livenessProbe.periodSeconds", 5),
    ),
    mutation(
        "liveness probe with its own grace period",
        "terminationGracePeriodSeconds",
        api("livenessProbe.terminationGracePeriodSeconds", 10),
    ),
    mutation(
        "startup probe window too short", "startupProbe", api("startupProbe.failureThreshold", 3)
    ),
    mutation(
        "startup probe window too long", "startupProbe", api("startupProbe.failureThreshold", 1800)
    ),
    mutation(
        "readiness probe slower than the drain",
        "readinessProbe",
        api("readinessProbe.periodSeconds", 10),
    ),
    mutation(
        "readiness checks longer than the probe timeout",
        "READINESS_TIMEOUT_SECONDS",
        setting("READINESS_TIMEOUT_SECONDS", "3"),
    ),
    # shutdown
    mutation(
        "preStop hook", "lifecycle", api("lifecycle", {"preStop": {"sleep": {"seconds": 10}}})
    ),
    mutation(
        "terminationGracePeriodSeconds too short",
        "TERMINATION_GRACE",
        pod("terminationGracePeriodSeconds", 30),
    ),
    mutation(
        "terminationGracePeriodSeconds missing",
        "TERMINATION_GRACE",
        pod("terminationGracePeriodSeconds", None),
    ),
    mutation(
        "TERMINATION_GRACE_SECONDS differs from the pod",
        "TERMINATION_GRACE",
        setting("TERMINATION_GRACE_SECONDS", "90"),
    ),
    mutation(
        "grace period shorter than the graceful timeout",
        "TERMINATION_GRACE_SECONDS=60",
        pod("terminationGracePeriodSeconds", 45),
        setting("TERMINATION_GRACE_SECONDS", "45"),
    ),
    mutation(
        "DRAIN_SECONDS shorter than the readiness probe",
        "DRAIN_SECONDS",
        setting("DRAIN_SECONDS", "5"),
    ),
    mutation("DRAIN_SECONDS is 0", "DRAIN_SECONDS", setting("DRAIN_SECONDS", "0")),
    mutation(
        "DRAIN_SECONDS too long for the graceful timeout",
        "DRAIN_SECONDS=30",
        setting("DRAIN_SECONDS", "30"),
    ),
    mutation(
        "RETIRE_SECONDS too long for the graceful timeout",
        "RETIRE_SECONDS=20",
        setting("RETIRE_SECONDS", "20"),
    ),
    mutation(
        "REQUEST_TIMEOUT_SECONDS longer than the graceful timeout",
        "REQUEST_TIMEOUT_SECONDS=60",
        setting("REQUEST_TIMEOUT_SECONDS", "60"),
    ),
    mutation(
        "GRACEFUL_TIMEOUT_SECONDS too short",
        "GRACEFUL_TIMEOUT_SECONDS=40",
        setting("GRACEFUL_TIMEOUT_SECONDS", "40"),
    ),
    mutation(
        "GRACEFUL_TIMEOUT_SECONDS longer than the grace period",
        "GRACEFUL_TIMEOUT_SECONDS=55",
        setting("GRACEFUL_TIMEOUT_SECONDS", "55"),
    ),
    mutation(
        "WORKER_TIMEOUT_SECONDS longer than the liveness window",
        "WORKER_TIMEOUT_SECONDS + 5 = 65",
        setting("WORKER_TIMEOUT_SECONDS", "60"),
    ),
    mutation(
        "WORKER_TIMEOUT_SECONDS is 0",
        "WORKER_TIMEOUT_SECONDS=0",
        setting("WORKER_TIMEOUT_SECONDS", "0"),
    ),
    mutation(
        "database timeouts longer than the request timeout",
        "DATABASE_COMMAND_TIMEOUT",
        setting("DATABASE_COMMAND_TIMEOUT_SECONDS", "30"),
    ),
    mutation(
        "gunicorn graceful_timeout differs from the settings",
        "gunicorn.conf.py: graceful_timeout",
        text("gunicorn_conf", "settings.graceful_timeout_seconds", "30"),
    ),
    mutation(
        "gunicorn timeout differs from the settings",
        "gunicorn.conf.py: timeout",
        text("gunicorn_conf", "settings.worker_timeout_seconds", "120"),
    ),
    mutation(
        "gunicorn keepalive differs from the settings",
        "gunicorn.conf.py: keepalive",
        text("gunicorn_conf", "settings.keepalive_seconds", "2"),
    ),
    mutation(
        "gunicorn.conf.py fails to load",
        "gunicorn.conf.py does not start",
        text("gunicorn_conf", "import atexit\n", "import no_module\n"),
    ),
    # proxies
    mutation(
        "KEEPALIVE_SECONDS shorter than that of the ingress",
        "KEEPALIVE_SECONDS",
        setting("KEEPALIVE_SECONDS", "30"),
    ),
    mutation(
        "nginx keeps idle connections longer than the service",
        "keepalive_timeout",
        text("proxy", "keepalive_timeout 60s;", "keepalive_timeout 90s;"),
    ),
    mutation(
        "nginx times out before the service",
        "proxy_read_timeout",
        text("proxy", "proxy_read_timeout 35s;", "proxy_read_timeout 20s;"),
    ),
    mutation(
        "HTTPRoute times out before the service",
        "HTTPRoute: spec.rules.0.timeouts",
        put("HTTPRoute", "spec.rules.0.timeouts.request", "10s"),
    ),
    mutation(
        "HTTPRoute without a timeout",
        "HTTPRoute: spec.rules.0.timeouts",
        put("HTTPRoute", "spec.rules.0.timeouts", None),
    ),
    mutation(
        "HTTPRoute backend with another port",
        "HTTPRoute: spec.rules.0.backendRefs",
        put("HTTPRoute", "spec.rules.0.backendRefs.0.port", 8000),
    ),
    mutation(
        "ServiceMonitor with another port",
        "ServiceMonitor: spec.endpoints.0.port",
        put("ServiceMonitor", "spec.endpoints.0.port", "http"),
    ),
    mutation(
        "ServiceMonitor selects no Service",
        "ServiceMonitor: spec.selector",
        label("ServiceMonitor", "spec.selector.matchLabels", NAME_LABEL, "web"),
    ),
    # ports
    mutation(
        "BIND on the loopback interface", "BIND=127.0.0.1:8000", setting("BIND", "127.0.0.1:8000")
    ),
    mutation("BIND on another port", "'http'", setting("BIND", "0.0.0.0:8080")),
    mutation(
        "METRICS_BIND on the loopback interface",
        "METRICS_BIND=127.0.0.1:9464",
        setting("METRICS_BIND", "127.0.0.1:9464"),
    ),
    mutation(
        "containerPort of the metrics differs", "'metrics'", api("ports.1.containerPort", 9090)
    ),
    mutation("containerPort without the expected name", "'http'", api("ports.0.name", "web")),
    mutation(
        "Service with an unknown targetPort",
        "Service: the port",
        service("spec.ports.0.targetPort", "htttp"),
    ),
    mutation(
        "Service without an appProtocol", "appProtocol", service("spec.ports.0.appProtocol", None)
    ),
    mutation("Service of type LoadBalancer", "LoadBalancer", service("spec.type", "LoadBalancer")),
    # selectors
    mutation(
        "Service selects no pods",
        "Service: spec.selector",
        label("Service", "spec.selector", COMPONENT_LABEL, "apii"),
    ),
    mutation(
        "Service selects the migration, too",
        "Service: spec.selector",
        label("Service", "spec.selector", COMPONENT_LABEL, None),
    ),
    mutation(
        "Deployment does not select its pods",
        "Deployment: spec.selector",
        label("Deployment", "spec.selector.matchLabels", COMPONENT_LABEL, "web"),
    ),
    mutation(
        "PodDisruptionBudget selects no pods",
        "PodDisruptionBudget: spec.selector",
        label("PodDisruptionBudget", "spec.selector.matchLabels", NAME_LABEL, "web"),
    ),
    mutation(
        "migration pods with the labels of the API",
        "the pods of the migration",
        label("Job", "spec.template.metadata.labels", COMPONENT_LABEL, "api"),
    ),
    mutation("no anti-affinity between nodes", "podAntiAffinity", pod("affinity", None)),
    mutation(
        "pods left pending when a zone is full",
        "whenUnsatisfiable",
        pod("topologySpreadConstraints.0.whenUnsatisfiable", "DoNotSchedule"),
    ),
    # pods and connections
    mutation(
        "more pods than Postgres has connections for", "maxReplicas", hpa("spec.maxReplicas", 12)
    ),
    mutation(
        "DATABASE_MAX_CONNECTIONS too high for Postgres",
        "DATABASE_MAX_CONNECTIONS=20",
        setting("DATABASE_MAX_CONNECTIONS", "20"),
    ),
    mutation(
        "POSTGRES_MAX_CONNECTIONS too low for a rollout",
        "POSTGRES_MAX_CONNECTIONS=100",
        setting("POSTGRES_MAX_CONNECTIONS", "100"),
    ),
    mutation(
        "maxSurge too large for Postgres",
        "maxSurge",
        deployment("spec.strategy.rollingUpdate.maxSurge", "50%"),
    ),
    mutation(
        "one connection for all workers",
        "DATABASE_MAX_CONNECTIONS=1",
        setting("DATABASE_MAX_CONNECTIONS", "1"),
    ),
    mutation(
        "no connection to the primary is left by the replica",
        "DATABASE_REPLICA_MAX_CONNECTIONS=8",
        setting("DATABASE_REPLICA_MAX_CONNECTIONS", "8"),
    ),
    mutation(
        "Deployment and autoscaler both set replicas",
        "spec.replicas",
        deployment("spec.replicas", 3),
    ),
    mutation("minReplicas is 1", "minReplicas", hpa("spec.minReplicas", 1)),
    mutation(
        "CPU target over the limit",
        "averageUtilization is 180",
        hpa("spec.metrics.0.resource.target.averageUtilization", 180),
    ),
    mutation("autoscaler without metrics", "no averageUtilization", hpa("spec.metrics", None)),
    mutation(
        "autoscaler targets another Deployment",
        "scaleTargetRef",
        hpa("spec.scaleTargetRef.name", "other"),
    ),
    mutation(
        "autoscaler without a stabilization window",
        "stabilizationWindowSeconds",
        hpa("spec.behavior.scaleDown.stabilizationWindowSeconds", 0),
    ),
    mutation(
        "HorizontalPodAutoscaler missing",
        "HorizontalPodAutoscaler: is missing",
        remove("HorizontalPodAutoscaler"),
    ),
    # memory and CPU
    mutation(
        "CPU limit under one CPU",
        "resources.limits.cpu is 0.5",
        api("resources.limits.cpu", "500m"),
    ),
    mutation(
        "CPU limit missing", "resources.limits.cpu is missing", api("resources.limits.cpu", None)
    ),
    mutation(
        "memory limit missing", "limits.memory is missing", api("resources.limits.memory", None)
    ),
    mutation("memory limit with an unknown unit", "256MB", api("resources.limits.memory", "256MB")),
    mutation(
        "memory request below the limit",
        "requests.memory is 128Mi",
        api("resources.requests.memory", "128Mi"),
    ),
    mutation(
        "memory limit too low for the workers",
        "memory limit",
        api("resources.limits.memory", "192Mi"),
        api("resources.requests.memory", "192Mi"),
    ),
    mutation(
        "WEB_CONCURRENCY too high for the pod", "WEB_CONCURRENCY", setting("WEB_CONCURRENCY", "4")
    ),
    mutation(
        "WORKER_MEMORY_MB too high for the limit",
        "memory limit",
        setting("WORKER_MEMORY_MB", "200"),
    ),
    mutation(
        "ephemeral-storage limit missing",
        "limits.ephemeral-storage is missing",
        migrate("resources.limits.ephemeral-storage", None),
    ),
    mutation(
        "/dev/shm is not mounted", "volumeMounts has no /dev/shm", api("volumeMounts.1", None)
    ),
    mutation(
        "emptyDir larger than the free memory",
        "sizeLimit",
        pod("volumes.1.emptyDir.sizeLimit", "64Mi"),
    ),
    mutation(
        "/dev/shm smaller than the metrics",
        "need 12 MB of /dev/shm, which has 4 MB",
        pod("volumes.1.emptyDir.sizeLimit", "4Mi"),
    ),
    mutation(
        "METRICS_MAX_LABEL_SETS too high for /dev/shm",
        "METRICS_MAX_LABEL_SETS=10000",
        setting("METRICS_MAX_LABEL_SETS", "10000"),
    ),
    mutation(
        "METRICS_BUCKETS without the bound of the objective",
        "METRICS_BUCKETS=0.1,1 has no 0.5",
        setting("METRICS_BUCKETS", "0.1,1"),
    ),
    mutation(
        "bodies larger than /tmp",
        "MAX_BUFFERED_BYTES=20000000",
        setting("MAX_BUFFERED_BYTES", "20000000"),
    ),
    mutation(
        "MAX_BODY_BYTES larger than /tmp",
        "MAX_BUFFERED_BYTES=20000000",
        setting("MAX_BODY_BYTES", "20000000"),
    ),
    mutation(
        "emptyDir without a sizeLimit",
        "the mount of /tmp",
        pod("volumes.0.emptyDir", {"medium": "Memory"}),
    ),
    mutation(
        "emptyDir on the disk",
        "the mount of /tmp",
        job(f"{POD}.volumes.0.emptyDir", {"sizeLimit": "16Mi"}),
    ),
    # rollouts and drains
    mutation(
        "rollout stops all pods at once",
        "maxUnavailable",
        deployment("spec.strategy.rollingUpdate.maxUnavailable", "100%"),
    ),
    mutation(
        "rollout stops a pod too early",
        "maxUnavailable",
        deployment("spec.strategy.rollingUpdate.maxUnavailable", 1),
    ),
    mutation(
        "rollout cannot add a pod",
        "maxSurge",
        deployment("spec.strategy.rollingUpdate.maxSurge", 0),
    ),
    mutation(
        "rollout strategy is Recreate",
        "strategy.type",
        deployment("spec.strategy", {"type": "Recreate"}),
    ),
    mutation(
        "minReadySeconds missing", "minReadySeconds", deployment("spec.minReadySeconds", None)
    ),
    mutation(
        "revisionHistoryLimit is 0",
        "revisionHistoryLimit",
        deployment("spec.revisionHistoryLimit", 0),
    ),
    mutation(
        "progressDeadlineSeconds too short",
        "progressDeadlineSeconds",
        deployment("spec.progressDeadlineSeconds", 30),
    ),
    mutation(
        "PodDisruptionBudget blocks node drains", "so 0 of 3 pods", pdb("spec.maxUnavailable", 0)
    ),
    mutation(
        "PodDisruptionBudget allows to evict all pods",
        "so 3 of 3 pods",
        pdb("spec.maxUnavailable", "100%"),
    ),
    mutation(
        "minAvailable blocks node drains",
        "minAvailable 3",
        pdb("spec.maxUnavailable", None),
        pdb("spec.minAvailable", 3),
    ),
    mutation(
        "unready pods block node drains",
        "unhealthyPodEvictionPolicy",
        pdb("spec.unhealthyPodEvictionPolicy", None),
    ),
    mutation(
        "PodDisruptionBudget missing",
        "PodDisruptionBudget: is missing",
        remove("PodDisruptionBudget"),
    ),
    # API versions
    mutation(
        "removed API version of the PodDisruptionBudget",
        "policy/v1beta1",
        pdb("apiVersion", "policy/v1beta1"),
    ),
    mutation(
        "removed API version of the autoscaler", "v2beta2", hpa("apiVersion", "autoscaling/v2beta2")
    ),
    # privileges
    mutation("default service account", "serviceAccountName", pod("serviceAccountName", "default")),
    mutation(
        "token mounted in the pod",
        "Deployment: spec.template.spec.automountServiceAccountToken",
        pod("automountServiceAccountToken", True),
    ),
    mutation(
        "token mounted by default",
        "ServiceAccount: automountServiceAccountToken",
        put("ServiceAccount", "automountServiceAccountToken", None),
    ),
    mutation("service links enabled", "enableServiceLinks", job(f"{POD}.enableServiceLinks", None)),
    mutation("privileged container", "privileged", api("securityContext.privileged", True)),
    mutation(
        "privilege escalation not forbidden",
        "allowPrivilegeEscalation",
        api("securityContext.allowPrivilegeEscalation", None),
    ),
    mutation(
        "root file system writable",
        "readOnlyRootFilesystem",
        api("securityContext.readOnlyRootFilesystem", False),
    ),
    mutation(
        "capability added", "capabilities", api("securityContext.capabilities.add", ["NET_ADMIN"])
    ),
    mutation(
        "capabilities not dropped", "capabilities", migrate("securityContext.capabilities", None)
    ),
    mutation("migration runs as root", "runAsUser", job(f"{POD}.securityContext.runAsUser", 0)),
    mutation("pod with another user", "runAsUser", pod("securityContext.runAsUser", 1000)),
    mutation("container with another group", "runAsGroup", api("securityContext.runAsGroup", 1000)),
    mutation("volumes with another group", "fsGroup", pod("securityContext.fsGroup", 2000)),
    mutation(
        "seccomp profile unconfined",
        "seccompProfile",
        pod("securityContext.seccompProfile.type", "Unconfined"),
    ),
    mutation("host network", "hostNetwork", pod("hostNetwork", True)),
    mutation(
        "side-car without restrictions",
        "containers.1",
        pod("containers.-", {"name": "x", "image": "x"}),
    ),
    mutation(
        "default namespace",
        "metadata.name is 'default'",
        put("Namespace", "metadata.name", "default"),
    ),
    mutation(
        "namespace does not enforce `restricted`",
        "pod-security.kubernetes.io/enforce",
        label("Namespace", "metadata.labels", "pod-security.kubernetes.io/enforce", "baseline"),
    ),
    mutation(
        "object in another namespace",
        "metadata.namespace",
        put("HTTPRoute", "metadata.namespace", "other"),
    ),
    # network policy
    mutation(
        "network policy without egress rules",
        "policyTypes",
        policy("spec.policyTypes", ["Ingress"]),
    ),
    mutation("NetworkPolicy missing", "NetworkPolicy: is missing", remove("NetworkPolicy")),
    mutation("ingress from everywhere", "spec.ingress.0", policy("spec.ingress.0.from", None)),
    mutation(
        "ingress from every namespace",
        "spec.ingress.0",
        policy("spec.ingress.0.from", [{"namespaceSelector": {}}]),
    ),
    mutation(
        "metrics open to clients",
        "shows the metrics",
        policy("spec.ingress.0.ports.-", {"port": "metrics", "protocol": "TCP"}),
    ),
    mutation("metrics port closed", "port metrics", policy("spec.ingress.1", None)),
    mutation(
        "egress to everywhere",
        "spec.egress.1",
        policy("spec.egress.1.to", [{"ipBlock": {"cidr": "0.0.0.0/0"}}]),
    ),
    mutation("egress on every port", "spec.egress.1", policy("spec.egress.1.ports", None)),
    mutation("port of Postgres closed", "5432", policy("spec.egress.1.ports.0", None)),
    mutation("port of Redis closed", "6379", policy("spec.egress.1.ports.1", None)),
    mutation("DNS port closed", "UDP port 53", policy("spec.egress.0.ports.0", None)),
    mutation(
        "port of the HTTP proxy closed",
        "TCP port 3128 of HTTPS_PROXY",
        setting("HTTPS_PROXY", "http://proxy.example:3128"),
    ),
    mutation(
        "port of a setting's URL closed",
        "TCP port 8443 of GATEWAY_URL",
        setting("GATEWAY_URL", "https://gateway.example:8443/v1"),
    ),
    mutation(
        "port of the second database host closed",
        "TCP port 5433 of DATABASE_URL",
        add_secret(
            database_url="postgresql://app@10.0.0.1:5432,10.0.0.2:5433/app",
            redis_url="redis://10.0.0.3:6379/0",
        ),
    ),
    mutation(
        "port of the replica closed",
        "TCP port 5434 of DATABASE_REPLICA_URL",
        add_secret(
            database_url="postgresql://app@10.0.0.1:5432/app",
            redis_url="redis://10.0.0.3:6379/0",
            database_replica_url="postgresql://app@10.0.0.2:5434/app",
        ),
    ),
    mutation(
        "network policy does not select the pods",
        "NetworkPolicy: spec.podSelector",
        label("NetworkPolicy", "spec.podSelector.matchLabels", NAME_LABEL, "web"),
    ),
    # settings and secrets
    mutation("unknown setting", "DRAIN_SECOND ", setting("DRAIN_SECOND", "10")),
    mutation("invalid value of a setting", "DRAIN_SECONDS=soon", setting("DRAIN_SECONDS", "soon")),
    mutation("unknown ConfigMap", "envFrom", api("envFrom.0.configMapRef.name", "other")),
    mutation(
        "ConfigMap without a hash",
        "no hash in its name",
        put("ConfigMap", "metadata.name", "config"),
        api("envFrom.0.configMapRef.name", "config"),
        migrate("envFrom.0.configMapRef.name", "config"),
    ),
    mutation(
        "development in production",
        "ENVIRONMENT is development",
        setting("ENVIRONMENT", "development"),
    ),
    mutation(
        "secret in the ConfigMap",
        "the variable DATABASE_URL is a secret",
        setting("DATABASE_URL", "postgresql://app@postgres/app"),
    ),
    mutation(
        "password in a variable",
        "has a password",
        api("env", [{"name": "REDIS_URL", "value": "redis://:hunter2@redis:6379/0"}]),
    ),
    mutation(
        "secret in a variable",
        "the variable DATABASE_URL is a secret",
        migrate(
            "env",
            [{"name": "DATABASE_URL", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
        ),
    ),
    mutation(
        "password in an annotation",
        "metadata.annotations.note has a password",
        job("metadata.annotations", {"note": "postgresql://app:hunter2@postgres/app"}),
    ),
    mutation(
        "Secret in git",
        "remove it from git",
        add(
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": "s", "namespace": "n"},
                "data": {},
            }
        ),
    ),
    mutation(
        "Secret of the overlay without a key",
        "has no 'redis_url', which the Deployment mounts",
        add_secret(database_url="postgresql://app@10.0.0.1/app"),
    ),
    mutation(
        "Secret of the overlay with an empty value",
        "has no 'database_url', which the Job mounts",
        add_secret(database_url="", redis_url="redis://10.0.0.3:6379/0"),
    ),
    mutation(
        "variable with a misspelled name of a library",
        "OTLP_ENDPOINT is not a setting",
        setting("OTLP_ENDPOINT", "http://collector:4317"),
    ),
    mutation(
        "secrets mounted elsewhere",
        "SECRETS_DIR",
        api("volumeMounts.2.mountPath", "/run/secrets/other"),
    ),
    mutation("SECRETS_DIR elsewhere", "SECRETS_DIR", setting("SECRETS_DIR", "/run/secrets/other")),
    mutation(
        "secret file is not a setting",
        "database_uri",
        pod("volumes.2.projected.sources.0.secret.items.0.path", "database_uri"),
    ),
    mutation(
        "secret file missing",
        "redis_url",
        pod("volumes.2.projected.sources.0.secret.items.1", None),
    ),
    mutation(
        "migration with an unneeded secret",
        "redis_url",
        job(
            f"{POD}.volumes.1.projected.sources.0.secret.items.-",
            {"key": "redis_url", "path": "redis_url"},
        ),
    ),
    # the image
    mutation(
        "image with the tag latest", "latest", api("image", "registry.example.com/service:latest")
    ),
    mutation(
        "image without a digest",
        "kustomize edit set image",
        api("image", "registry.example.com/service:1.0.0"),
    ),
    mutation(
        "migration with another image",
        "set it to the image of the API",
        migrate("image", f"registry.example.com/x:1@sha256:{'1' * 64}"),
    ),
    mutation(
        "image from the node's cache", "imagePullPolicy", api("imagePullPolicy", "IfNotPresent")
    ),
    # the migration
    mutation("Job missing", "Job: is missing", remove("Job")),
    mutation(
        "finished Jobs are not deleted",
        "ttlSecondsAfterFinished",
        job("spec.ttlSecondsAfterFinished", None),
    ),
    mutation(
        "migration without a deadline",
        "activeDeadlineSeconds",
        job("spec.activeDeadlineSeconds", None),
    ),
    mutation("migration retries too often", "backoffLimit", job("spec.backoffLimit", 100)),
    mutation(
        "migration restarts in place and loses logs",
        "restartPolicy",
        job(f"{POD}.restartPolicy", "OnFailure"),
    ),
    mutation(
        "migration started by a shell",
        "containers.0.command",
        migrate("command", ["sh", "-c", "alembic upgrade head; true"]),
    ),
    mutation(
        "API without the component label",
        "Deployment: the label app.kubernetes.io/component",
        label("Deployment", "metadata.labels", COMPONENT_LABEL, None),
    ),
    mutation(
        "migration with the component label of the API",
        "Job: the label app.kubernetes.io/component",
        label("Job", "metadata.labels", COMPONENT_LABEL, "api"),
    ),
    # the Dockerfile
    mutation("USER by name", "USER is 'app'", text("dockerfile", "USER 10001:10001", "USER app")),
    mutation("USER is root", "USER is '0:0'", text("dockerfile", "USER 10001:10001", "USER 0:0")),
    mutation("USER missing", "USER is ''", text("dockerfile", "USER 10001:10001\n", "")),
    mutation(
        "USER differs from the manifests",
        "runAsUser",
        text("dockerfile", "USER 10001:10001", "USER 65532:65532"),
    ),
    mutation(
        "CMD started by a shell",
        "CMD is 'gunicorn'",
        text("dockerfile", '\nCMD ["gunicorn"]', "\nCMD gunicorn"),
    ),
    mutation(
        "CMD is uvicorn",
        "app.main:app",
        text("dockerfile", '\nCMD ["gunicorn"]', '\nCMD ["uvicorn", "app.main:app"]'),
    ),
    mutation(
        "ENTRYPOINT",
        "ENTRYPOINT",
        text("dockerfile", '\nCMD ["gunicorn"]', '\nENTRYPOINT ["sh"]\nCMD ["gunicorn"]'),
    ),
    mutation(
        "STOPSIGNAL is SIGINT",
        "STOPSIGNAL",
        text("dockerfile", "STOPSIGNAL SIGTERM", "STOPSIGNAL SIGINT"),
    ),
    mutation(
        "HEALTHCHECK uses curl",
        "HEALTHCHECK",
        text(
            "dockerfile", 'CMD ["python", "-m", "app.serving.healthcheck"]', "CMD curl -f localhost"
        ),
    ),
    mutation(
        "migrations not copied",
        "COPY migrations",
        text("dockerfile", "COPY migrations ./migrations\n", ""),
    ),
    mutation(
        "alembic.ini not copied",
        "COPY alembic.ini",
        text("dockerfile", "COPY alembic.ini gunicorn", "COPY gunicorn"),
    ),
    mutation(
        "tests copied",
        "COPY tests",
        text("dockerfile", "COPY app ./app\n", "COPY app ./app\nCOPY tests ./tests\n"),
    ),
    mutation(
        "development requirements copied",
        "requirements-dev.txt",
        text(
            "dockerfile",
            "COPY requirements.txt /tmp/",
            "COPY requirements.txt requirements-dev.txt /tmp/",
        ),
    ),
    mutation(
        "packages installed without hashes",
        "--require-hashes",
        text("dockerfile", "--require-hashes ", ""),
    ),
    mutation(
        "packages installed in the last stage",
        "last stage",
        text("dockerfile", "USER 10001:10001", "RUN pip install extra\nUSER 10001:10001"),
    ),
    mutation(
        "unknown variable in the image",
        "METRIC_BIND",
        text("dockerfile", "METRICS_BIND=", "METRIC_BIND="),
    ),
    # fields that override the image, and others
    mutation(
        "pod overrides the command",
        "containers.0.command",
        api("command", ["sh", "-c", "gunicorn"]),
    ),
    mutation(
        "pod overrides the arguments",
        "containers.0.args",
        api("args", ["gunicorn", "--workers", "4"]),
    ),
    mutation("pod overrides the working directory", "workingDir", api("workingDir", "/")),
    mutation(
        "probe with an initial delay",
        "initialDelaySeconds",
        api("startupProbe.initialDelaySeconds", 300),
    ),
    mutation("probe over TLS", "httpGet.scheme", api("readinessProbe.httpGet.scheme", "HTTPS")),
    mutation(
        "probe of another host", "httpGet.host", api("livenessProbe.httpGet.host", "example.com")
    ),
    mutation(
        "readiness needs ten successes",
        "successThreshold",
        api("readinessProbe.successThreshold", 10),
    ),
    mutation(
        "unready pods get requests",
        "publishNotReady",
        service("spec.publishNotReadyAddresses", True),
    ),
    mutation(
        "secret is optional",
        "secret.optional",
        pod("volumes.2.projected.sources.0.secret.optional", True),
    ),
    mutation(
        "forwarded headers trusted from everywhere",
        "FORWARDED_ALLOW_IPS",
        setting("FORWARDED_ALLOW_IPS", "*"),
    ),
    mutation("migration suspended", "spec.suspend", job("spec.suspend", True)),
    mutation("migrations in parallel", "parallelism", job("spec.parallelism", 3)),
    mutation("migration only prints SQL", "containers.0.args", migrate("args", ["--sql"])),
    mutation("port of the node", "hostPort", api("ports.0.hostPort", 8000)),
    mutation(
        "directory of the node",
        "hostPath",
        pod("volumes.-", {"name": "x", "hostPath": {"path": "/var"}}),
    ),
    mutation("rollout paused", "spec.paused", deployment("spec.paused", True)),
    mutation(
        "CPU target far below the limit",
        "averageUtilization is 70",
        hpa("spec.metrics.0.resource.target.averageUtilization", 70),
    ),
    mutation(
        "scale-up disabled", "selectPolicy", hpa("spec.behavior.scaleUp.selectPolicy", "Disabled")
    ),
    mutation(
        "stages with different bases",
        "FROM has",
        text(
            "dockerfile",
            "FROM ${BASE_IMAGE:-default} AS runtime",
            "FROM python:3.14-alpine AS runtime",
        ),
    ),
    mutation(
        "packages not copied to the last stage",
        "COPY --from=builder /opt/venv",
        text("dockerfile", "COPY --from=builder /opt/venv /opt/venv\n", ""),
    ),
    mutation(
        "packages not on PATH", "ENV PATH", text("dockerfile", "PATH=/opt/venv/bin:$PATH", "LANG=C")
    ),
    mutation(
        "secrets in the build context",
        "!.secrets",
        text("dockerignore", "!app\n", "!app\n!.secrets\n"),
    ),
    # nginx in compose
    mutation(
        "nginx repeats a POST",
        "non_idempotent",
        text("proxy", "error timeout;", "error non_idempotent;"),
    ),
    mutation(
        "nginx keeps idle connections for an hour",
        "keepalive_timeout",
        text("proxy", "timeout 60s;", "timeout 1h;"),
    ),
    mutation(
        "nginx body limit too low",
        "client_max_body_size",
        text("proxy", "body_size 2m;", "body_size 512k;"),
    ),
    mutation(
        "nginx header limit too low",
        "large_client_header",
        text("proxy", "buffers 4 32k;", "buffers 4 8k;"),
    ),
    # compose
    mutation(
        "request timeout in compose longer than that of nginx",
        "proxy_read_timeout",
        api_in_compose("REQUEST_TIMEOUT_SECONDS: 60"),
    ),
    mutation("invalid value in compose", "ENVIRONMENT=x", api_in_compose("ENVIRONMENT: x")),
    mutation(
        "root file system writable in compose",
        "read_only",
        text("compose", "read_only: true", "read_only: false"),
    ),
    mutation(
        "capabilities in compose", "cap_drop", text("compose", "cap_drop: [ALL]", "cap_drop: []")
    ),
    mutation(
        "root user in compose", "runs as root", text("compose", 'user: "999:999"', "user: root")
    ),
    mutation(
        "password in compose",
        "has a password",
        api_in_compose("ENVIRONMENT: redis://:secret@redis"),
    ),
    mutation(
        "stop grace period in compose too short",
        "stop_grace_period",
        text("compose", "stop_grace_period: 60s #", "#"),
    ),
    mutation(
        "unknown setting in compose",
        "SECRET_DIR",
        text("compose", "SECRETS_DIR: /run", "SECRET_DIR: /run"),
    ),
    mutation(
        "Postgres in compose allows fewer connections",
        "max_connections",
        text("compose", "max_connections=200", "max_connections=50"),
    ),
    mutation(
        "compose trusts forwarded headers from everywhere",
        "FORWARDED_ALLOW_IPS",
        text("compose", 'IPS: "${EDGE_NETWORK:-10.203.71}.10"', "IPS: '*'"),
    ),
    mutation(
        "compose listens on all interfaces",
        "start it with 127.0.0.1",
        text("compose", '"127.0.0.1:${HTTP', '"${HTTP'),
    ),
    mutation(
        "build context without the migrations",
        "!migrations is missing",
        text("dockerignore", "!migrations\n", ""),
    ),
    mutation(
        "build context with everything",
        "the line * is missing",
        text("dockerignore", "*\n!alembic", "!alembic"),
    ),
]
MUTATIONS += [
    # workers
    mutation(
        "consumer started by a shell",
        "Deployment consumer: spec.template.spec.containers.0.command",
        consumer("command", ["sh", "-c", "python -m app.payments.consumer"]),
    ),
    mutation(
        "worker starts a module that does not exist",
        "Deployment jobs: spec.template.spec.containers.0.command",
        jobs_container("command", ["python", "-m", "app.job_main"]),
    ),
    mutation(
        "worker with additional arguments", "containers.0.args", jobs_container("args", ["--fast"])
    ),
    mutation(
        "consumer without a liveness probe",
        "livenessProbe.httpGet.path is missing",
        consumer("livenessProbe", None),
    ),
    mutation(
        "liveness probe of a worker checks the dependencies",
        "livenessProbe.httpGet.path",
        jobs_container("livenessProbe.httpGet.path", "/health/ready"),
    ),
    mutation(
        "probe of a worker on the port of the API",
        "startupProbe.httpGet.port",
        jobs_container("startupProbe.httpGet.port", "http"),
    ),
    mutation(
        "readiness probe of a worker times out before its checks",
        "readinessProbe.timeoutSeconds is 1",
        jobs_container("readinessProbe.timeoutSeconds", 1),
    ),
    mutation(
        "startup probe of a worker with a short window",
        "startupProbe fails after 4 s",
        jobs_container("startupProbe.failureThreshold", 2),
    ),
    mutation(
        "metrics of a worker on another port",
        "set it to metrics, on the port of METRICS_BIND",
        jobs_container("ports.0.containerPort", 9000),
    ),
    mutation(
        "worker is killed while it finishes its jobs",
        "Deployment jobs: spec.template.spec.terminationGracePeriodSeconds is 55",
        jobs(f"{POD}.terminationGracePeriodSeconds", 55),
    ),
    mutation(
        "grace period of the consumer missing",
        "Deployment consumer: spec.template.spec.terminationGracePeriodSeconds is 0",
        put("Deployment", f"{POD}.terminationGracePeriodSeconds", None, "consumer"),
    ),
    mutation(
        "consumer without pods",
        "Deployment consumer: spec.replicas is 0",
        put("Deployment", "spec.replicas", 0, "consumer"),
    ),
    mutation(
        "Deployment and KEDA both set replicas",
        "the number that the ScaledObject has set",
        jobs("spec.replicas", 2),
    ),
    mutation(
        "KEDA stops all workers",
        "ScaledObject: spec.minReplicaCount is 0",
        keda("spec.minReplicaCount", 0),
    ),
    mutation(
        "KEDA scales another Deployment",
        "Deployment jobs: spec.replicas is missing",
        keda("spec.scaleTargetRef.name", "other"),
    ),
    mutation(
        "Service of a worker selects the API",
        "Service jobs: spec.selector",
        put("Service", "spec.selector", {COMPONENT_LABEL: "api"}, "jobs"),
    ),
    mutation(
        "workers spread away from the consumer",
        "Deployment jobs: spec.template.spec.topologySpreadConstraints",
        jobs(
            f"{POD}.topologySpreadConstraints.0.labelSelector.matchLabels",
            {COMPONENT_LABEL: "consumer"},
        ),
    ),
    mutation(
        "metrics of a worker without a Service",
        "Deployment jobs: the ports of its Services are ['http']",
        put("Service", "spec.ports.0.targetPort", "http", "jobs"),
    ),
    # jobs
    mutation(
        "fraction of a CPU for the processes of the jobs",
        "resources.limits.cpu is 1.5",
        jobs_container("resources.limits.cpu", "1500m"),
    ),
    mutation("more processes than CPUs", "JOB_PROCESSES is 4", setting("JOB_PROCESSES", "4")),
    mutation(
        "memory limit too low for the processes",
        "1.2 x (70 + 15 x 2 processes)",
        jobs_container("resources.limits.memory", "128Mi"),
        jobs_container("resources.requests.memory", "128Mi"),
    ),
    mutation(
        "memory limit too low for many processes",
        "1.2 x (70 + 15 x 32 processes)",
        jobs_container("resources.limits.cpu", "32"),
    ),
    mutation(
        "connections of the workers exceed those of Postgres",
        "13 jobs pods x DATABASE_MAX_CONNECTIONS=8",
        jobs_container("env.0.value", "8"),
    ),
    mutation(
        "rollout of the workers overlaps with their shutdown",
        "20 jobs pods",
        jobs("spec.minReadySeconds", 5),
    ),
    mutation(
        "rollout of the workers starts many at once",
        "20 jobs pods",
        jobs("spec.strategy.rollingUpdate.maxSurge", 5),
    ),
    mutation(
        "KEDA starts more workers than Postgres has connections for",
        "25 jobs pods",
        keda("spec.maxReplicaCount", 20),
    ),
    mutation(
        "connections of KEDA not counted",
        "2 (KEDA) = 242 connections exceed POSTGRES_MAX_CONNECTIONS=241",
        setting("POSTGRES_MAX_CONNECTIONS", "241"),
    ),
    mutation(
        "API with the login to RabbitMQ",
        "Deployment: spec.template.spec.volumes has amqp_url",
        pod(
            "volumes.2.projected.sources.0.secret.items.-", {"key": "amqp_url", "path": "amqp_url"}
        ),
    ),
    mutation("port of RabbitMQ closed", "TCP port 5671 of AMQP_URL", close_port(5671)),
    mutation(
        "login to RabbitMQ in the ConfigMap",
        "the variable AMQP_URL is a secret",
        setting("AMQP_URL", "amqps://rabbitmq.example/orders"),
    ),
    mutation(
        "KEDA removes workers at once",
        "scaleDown.stabilizationWindowSeconds is 0",
        keda(f"{BEHAVIOR}.scaleDown.stabilizationWindowSeconds", 0),
    ),
    mutation(
        "KEDA removes many workers at a time",
        "scaleDown.policies",
        keda(f"{BEHAVIOR}.scaleDown.policies.0.value", 5),
    ),
    mutation(
        "KEDA never adds workers",
        "ScaledObject: spec.advanced.horizontalPodAutoscalerConfig.behavior.scaleUp",
        keda(f"{BEHAVIOR}.scaleUp.selectPolicy", "Disabled"),
    ),
    mutation(
        "KEDA polls every ten minutes",
        "spec.pollingInterval is 600",
        keda("spec.pollingInterval", 600),
    ),
    mutation(
        "KEDA changes the number of workers without Postgres",
        "ScaledObject: spec.fallback",
        keda("spec.fallback", {"failureThreshold": 3, "replicas": 1}),
    ),
    mutation(
        "KEDA counts messages of RabbitMQ",
        "ScaledObject: spec.triggers.0.type is 'rabbitmq'",
        keda("spec.triggers.0.type", "rabbitmq"),
    ),
    mutation(
        "target of KEDA is not one worker",
        "targetQueryValue",
        keda("spec.triggers.0.metadata.targetQueryValue", "10"),
    ),
    mutation(
        "query of KEDA for another concurrency",
        "divide the running jobs by JOB_CONCURRENCY=16",
        setting("JOB_CONCURRENCY", "16"),
    ),
    mutation(
        "query of KEDA counts too few jobs",
        "make its limit maxReplicaCount=12",
        keda("spec.maxReplicaCount", 12),
    ),
    mutation(
        "KEDA without a login",
        "authenticationRef is 'other'",
        keda("spec.triggers.0.authenticationRef.name", "other"),
    ),
    mutation(
        "KEDA with a whole URL",
        "with ['connection', 'dbName'",
        put("TriggerAuthentication", "spec.secretTargetRef.0.parameter", "connection"),
    ),
    mutation(
        "KEDA with the login of the pods",
        "TriggerAuthentication: spec.secretTargetRef has the Secret of the pods",
        share_secret_with_keda(),
    ),
    mutation(
        "stop grace period of the workers in compose missing",
        "compose.yaml: jobs: stop_grace_period is 10s",
        text(
            "compose",
            "cpus: 1 # one process for each CPU\n    pids_limit: 200\n    stop_grace_period: 60s",
            "cpus: 1",
        ),
    ),
    mutation(
        "root file system of RabbitMQ writable in compose",
        "compose.rabbitmq.yaml: rabbitmq: read_only is False",
        rabbitmq("read_only: true", "read_only: false"),
    ),
    mutation(
        "RabbitMQ in compose runs as root",
        "compose.rabbitmq.yaml: rabbitmq: runs as root",
        rabbitmq("user: rabbitmq", "user: root"),
    ),
    mutation(
        "RabbitMQ in compose open to other machines",
        "compose.rabbitmq.yaml: rabbitmq: ports has 5672:5672",
        rabbitmq("networks: [backend]", 'networks: [backend]\n    ports: ["5672:5672"]'),
    ),
    mutation(
        "login to RabbitMQ in the environment in compose",
        "environment.AMQP_URL has a password",
        rabbitmq(
            "secrets: [amqp_url]", "environment: {AMQP_URL: 'amqp://app:secret@rabbitmq:5672/'}"
        ),
    ),
]
NO_MUTATION = mutation("no mutation", "")


def find_all_problems() -> dict[str, list[str]]:
    """Return the problems that the deployment rules find in each regression, by description."""
    from tests.deploy.checking import find_problems
    from tests.deploy.deployed import Deployed, read, with_every_component
    from tests.deploy.rules import RULES

    with tempfile.TemporaryDirectory() as directory:
        overlay = with_every_component("prod", Path(directory, "k8s"))
        original = vars(read("prod", overlay))
    problems: dict[str, list[str]] = {}
    for each in (NO_MUTATION, *MUTATIONS):
        fields = copy.deepcopy(original)
        for change in each.changes:
            change(fields)
        is_changed = fields != original
        assert is_changed is bool(each.changes), each.description
        deployed = Deployed(**fields)
        found = problems.setdefault(each.description, [])
        for rule in RULES:
            found += find_problems(rule, deployed)
    return problems


if __name__ == "__main__":
    sys.stdout.write(json.dumps(find_all_problems()))
