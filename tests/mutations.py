"""Deliberate regressions of a deployment: what each of them breaks, and the word by which the contract has to name it.

Run by the interpreter of the generated project, in its folder, this module holds each of them against the contract of
that project (its tests/deploy), and prints what that says as JSON.
"""

import copy
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

Files = dict[str, Any]  # the fields of the project's `Deployed`
Change = Callable[[Files], None]


class Mutation(NamedTuple):
    """One regression: what is wrong with it, the word that has to be in a fault, and how it is made."""

    what: str
    word: str
    changes: tuple[Change, ...]


def mutation(what: str, word: str, *changes: Change) -> Mutation:
    """Return a regression that is made by these changes."""
    return Mutation(what, word, changes)


def put(kind: str, path: str, value: object) -> Change:
    """Set a field of the object of a kind, such as `spec.ports.0.name`; None removes it, `-` at the end appends."""

    def change(files: Files) -> None:
        place = next(document for document in files["documents"] if document["kind"] == kind)
        *keys, last = path.split(".")
        for key in keys:
            place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
        if last == "-":
            place.append(value)
        elif value is None:
            del place[int(last) if isinstance(place, list) else last]
        else:
            place[int(last) if isinstance(place, list) else last] = value

    return change


def label(kind: str, path: str, name: str, value: str | None) -> Change:
    """Set or remove a label, whose name has dots."""

    def change(files: Files) -> None:
        place = next(document for document in files["documents"] if document["kind"] == kind)
        for key in path.split("."):
            place = place[key]
        place.pop(name)
        place.update({name: value} if value is not None else {})

    return change


def setting(name: str, value: str) -> Change:
    """Set a variable of the ConfigMap."""
    return put("ConfigMap", f"data.{name}", value)


def text(file: str, before: str, after: str) -> Change:
    """Replace a text that stands once in a file of the project, named as in `Deployed`."""

    def change(files: Files) -> None:
        assert files[file].count(before) == 1, (
            f"{before!r} stands {files[file].count(before)} times in {file}"
        )
        files[file] = files[file].replace(before, after)

    return change


def add(document: dict[str, Any]) -> Change:
    """Add a document."""
    return lambda files: files["documents"].append(document)


def remove(kind: str) -> Change:
    """Remove the documents of a kind."""

    def change(files: Files) -> None:
        files["documents"] = [
            document for document in files["documents"] if document["kind"] != kind
        ]

    return change


POD = "spec.template.spec"
API = f"{POD}.containers.0"
NAME, COMPONENT = "app.kubernetes.io/name", "app.kubernetes.io/component"
deployment, job, service = (partial(put, kind) for kind in ("Deployment", "Job", "Service"))
hpa, pdb, policy = (
    partial(put, kind)
    for kind in ("HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy")
)


def pod(path: str, value: object) -> Change:
    """Set a field of the API's pods."""
    return deployment(f"{POD}.{path}", value)


def api(path: str, value: object) -> Change:
    """Set a field of the API's container."""
    return deployment(f"{API}.{path}", value)


def migrate(path: str, value: object) -> Change:
    """Set a field of the migration's container."""
    return job(f"{API}.{path}", value)


MUTATIONS = [
    # probes
    mutation("no startup probe", "startupProbe", api("startupProbe", None)),
    mutation("no liveness probe", "livenessProbe", api("livenessProbe", None)),
    mutation("no readiness probe", "readinessProbe", api("readinessProbe", None)),
    mutation("a path that is no route", "/readyz", api("readinessProbe.httpGet.path", "/readyz")),
    mutation(
        "liveness asks the dependencies",
        "livenessProbe.httpGet.path",
        api("livenessProbe.httpGet.path", "/health/ready"),
    ),
    mutation("a port without a name", "httpGet.port", api("startupProbe.httpGet.port", 8000)),
    mutation("a port that is none", "httpGet.port", api("readinessProbe.httpGet.port", "web")),
    mutation(
        "readiness in 1 s", "readinessProbe.timeoutSeconds", api("readinessProbe.timeoutSeconds", 1)
    ),
    mutation(
        "a stuck worker costs the pod", "livenessProbe", api("livenessProbe.periodSeconds", 5)
    ),
    mutation(
        "liveness kills before the end is over",
        "terminationGracePeriodSeconds",
        api("livenessProbe.terminationGracePeriodSeconds", 10),
    ),
    mutation("no time to start", "startupProbe", api("startupProbe.failureThreshold", 3)),
    mutation("an hour to start", "startupProbe", api("startupProbe.failureThreshold", 1800)),
    mutation(
        "readiness slower than the drain", "readinessProbe", api("readinessProbe.periodSeconds", 10)
    ),
    mutation(
        "checks longer than the probe",
        "READINESS_TIMEOUT_SECONDS",
        setting("READINESS_TIMEOUT_SECONDS", "3"),
    ),
    # the end
    mutation("a preStop", "lifecycle", api("lifecycle", {"preStop": {"sleep": {"seconds": 10}}})),
    mutation("a short grace", "TERMINATION_GRACE", pod("terminationGracePeriodSeconds", 30)),
    mutation("the default grace", "TERMINATION_GRACE", pod("terminationGracePeriodSeconds", None)),
    mutation(
        "a grace that is declared wrong",
        "TERMINATION_GRACE",
        setting("TERMINATION_GRACE_SECONDS", "90"),
    ),
    mutation(
        "a short grace that is declared",
        "SIGKILL",
        pod("terminationGracePeriodSeconds", 45),
        setting("TERMINATION_GRACE_SECONDS", "45"),
    ),
    mutation("a drain shorter than readiness", "DRAIN_SECONDS", setting("DRAIN_SECONDS", "5")),
    mutation("no drain", "DRAIN_SECONDS", setting("DRAIN_SECONDS", "0")),
    mutation("a drain that leaves no time", "DRAIN_SECONDS=30", setting("DRAIN_SECONDS", "30")),
    mutation(
        "a retirement that leaves no time", "RETIRE_SECONDS=20", setting("RETIRE_SECONDS", "20")
    ),
    mutation(
        "requests longer than the end",
        "REQUEST_TIMEOUT_SECONDS=60",
        setting("REQUEST_TIMEOUT_SECONDS", "60"),
    ),
    mutation(
        "an end that is too short",
        "GRACEFUL_TIMEOUT_SECONDS=40",
        setting("GRACEFUL_TIMEOUT_SECONDS", "40"),
    ),
    mutation(
        "an end longer than the grace",
        "GRACEFUL_TIMEOUT_SECONDS=55",
        setting("GRACEFUL_TIMEOUT_SECONDS", "55"),
    ),
    mutation(
        "a stuck worker lives longer than the pod",
        "WORKER_TIMEOUT",
        setting("WORKER_TIMEOUT_SECONDS", "60"),
    ),
    mutation(
        "stuck workers stay", "WORKER_TIMEOUT_SECONDS=0", setting("WORKER_TIMEOUT_SECONDS", "0")
    ),
    mutation(
        "an outage is a 504",
        "DATABASE_COMMAND_TIMEOUT",
        setting("DATABASE_COMMAND_TIMEOUT_SECONDS", "30"),
    ),
    mutation(
        "gunicorn's own end",
        "gunicorn.conf.py: graceful_timeout",
        text("gunicorn_conf", "settings.graceful_timeout_seconds", "30"),
    ),
    mutation(
        "gunicorn's own patience",
        "gunicorn.conf.py: timeout",
        text("gunicorn_conf", "settings.worker_timeout_seconds", "120"),
    ),
    mutation(
        "gunicorn's own keep-alive",
        "gunicorn.conf.py: keepalive",
        text("gunicorn_conf", "settings.keepalive_seconds", "2"),
    ),
    mutation(
        "gunicorn.conf.py does not load",
        "gunicorn.conf.py",
        text("gunicorn_conf", "import atexit\n", "import no_module\n"),
    ),
    # proxies
    mutation(
        "connections end before the proxy's",
        "KEEPALIVE_SECONDS",
        setting("KEEPALIVE_SECONDS", "30"),
    ),
    mutation(
        "the proxy keeps them longer",
        "keepalive_timeout",
        text("proxy", "keepalive_timeout 60s;", "keepalive_timeout 90s;"),
    ),
    mutation(
        "the proxy does not wait",
        "proxy_read_timeout",
        text("proxy", "proxy_read_timeout 35s;", "proxy_read_timeout 20s;"),
    ),
    mutation(
        "the route does not wait",
        "HTTPRoute",
        put("HTTPRoute", "spec.rules.0.timeouts.request", "10s"),
    ),
    mutation("the route has no time", "HTTPRoute", put("HTTPRoute", "spec.rules.0.timeouts", None)),
    mutation(
        "the route names another port",
        "HTTPRoute",
        put("HTTPRoute", "spec.rules.0.backendRefs.0.port", 8000),
    ),
    mutation(
        "metrics are looked for elsewhere",
        "ServiceMonitor",
        put("ServiceMonitor", "spec.endpoints.0.port", "http"),
    ),
    mutation(
        "the monitor selects nothing",
        "ServiceMonitor",
        label("ServiceMonitor", "spec.selector.matchLabels", NAME, "web"),
    ),
    # ports
    mutation("it hears nobody", "BIND=127.0.0.1:8000", setting("BIND", "127.0.0.1:8000")),
    mutation("it listens elsewhere", "'http'", setting("BIND", "0.0.0.0:8080")),
    mutation("nobody can scrape", "METRICS_BIND", setting("METRICS_BIND", "127.0.0.1:9464")),
    mutation("metrics are on another port", "'metrics'", api("ports.1.containerPort", 9090)),
    mutation("a port without its name", "'http'", api("ports.0.name", "web")),
    mutation(
        "a Service to no port", "Service: the port", service("spec.ports.0.targetPort", "htttp")
    ),
    mutation(
        "a Service without a protocol", "appProtocol", service("spec.ports.0.appProtocol", None)
    ),
    mutation("a Service open to the world", "LoadBalancer", service("spec.type", "LoadBalancer")),
    # selectors
    mutation(
        "a Service without pods",
        "Service: spec.selector",
        label("Service", "spec.selector", COMPONENT, "apii"),
    ),
    mutation(
        "a Service that takes the migration too",
        "Service: spec.selector",
        label("Service", "spec.selector", COMPONENT, None),
    ),
    mutation(
        "a Deployment that owns no pods",
        "Deployment: spec.selector",
        label("Deployment", "spec.selector.matchLabels", COMPONENT, "web"),
    ),
    mutation(
        "a budget for no pods",
        "PodDisruptionBudget: spec.selector",
        label("PodDisruptionBudget", "spec.selector.matchLabels", NAME, "web"),
    ),
    mutation(
        "the migration's pods look like the API's",
        "migration",
        label("Job", "spec.template.metadata.labels", COMPONENT, "api"),
    ),
    mutation("pods may all be on one node", "podAntiAffinity", pod("affinity", None)),
    mutation(
        "pods are pending for want of a zone",
        "whenUnsatisfiable",
        pod("topologySpreadConstraints.0.whenUnsatisfiable", "DoNotSchedule"),
    ),
    # pods and connections
    mutation("too many pods for Postgres", "maxReplicas", hpa("spec.maxReplicas", 12)),
    mutation(
        "too many connections each",
        "DATABASE_MAX_CONNECTIONS=20",
        setting("DATABASE_MAX_CONNECTIONS", "20"),
    ),
    mutation(
        "a smaller Postgres",
        "POSTGRES_MAX_CONNECTIONS=100",
        setting("POSTGRES_MAX_CONNECTIONS", "100"),
    ),
    mutation(
        "a surge too large for it",
        "maxSurge",
        deployment("spec.strategy.rollingUpdate.maxSurge", "50%"),
    ),
    mutation(
        "one connection for all",
        "DATABASE_MAX_CONNECTIONS=1",
        setting("DATABASE_MAX_CONNECTIONS", "1"),
    ),
    mutation("replicas beside the autoscaler", "spec.replicas", deployment("spec.replicas", 3)),
    mutation("one pod", "minReplicas", hpa("spec.minReplicas", 1)),
    mutation(
        "a target over the limit",
        "averageUtilization",
        hpa("spec.metrics.0.resource.target.averageUtilization", 180),
    ),
    mutation("nothing to scale by", "averageUtilization", hpa("spec.metrics", None)),
    mutation("it scales another", "scaleTargetRef", hpa("spec.scaleTargetRef.name", "other")),
    mutation(
        "it flaps",
        "stabilizationWindowSeconds",
        hpa("spec.behavior.scaleDown.stabilizationWindowSeconds", 0),
    ),
    mutation("no autoscaler", "HorizontalPodAutoscaler", remove("HorizontalPodAutoscaler")),
    # memory and CPU
    mutation("half a CPU", "resources.limits.cpu", api("resources.limits.cpu", "500m")),
    mutation("no limit of CPU", "cpu", api("resources.limits.cpu", None)),
    mutation("a unit that is none", "256MB", api("resources.limits.memory", "256MB")),
    mutation("memory that is not reserved", "memory", api("resources.requests.memory", "128Mi")),
    mutation(
        "too little memory",
        "memory limit",
        api("resources.limits.memory", "192Mi"),
        api("resources.requests.memory", "192Mi"),
    ),
    mutation("workers that do not fit", "WEB_CONCURRENCY", setting("WEB_CONCURRENCY", "4")),
    mutation("workers that are larger", "memory limit", setting("WORKER_MEMORY_MB", "200")),
    mutation(
        "no bound on the disk",
        "ephemeral-storage",
        migrate("resources.limits.ephemeral-storage", None),
    ),
    mutation("nothing to write to", "/dev/shm", api("volumeMounts.1", None)),
    mutation("files fill the memory", "sizeLimit", pod("volumes.1.emptyDir.sizeLimit", "64Mi")),
    mutation("files without a bound", "/tmp", pod("volumes.0.emptyDir", {"medium": "Memory"})),
    mutation("files on the disk", "/tmp", job(f"{POD}.volumes.0.emptyDir", {"sizeLimit": "16Mi"})),
    # rollouts and drains
    mutation(
        "all pods at once",
        "maxUnavailable",
        deployment("spec.strategy.rollingUpdate.maxUnavailable", "100%"),
    ),
    mutation(
        "a pod less during rollouts",
        "maxUnavailable",
        deployment("spec.strategy.rollingUpdate.maxUnavailable", 1),
    ),
    mutation("nothing moves", "maxSurge", deployment("spec.strategy.rollingUpdate.maxSurge", 0)),
    mutation(
        "a pause at every rollout",
        "strategy.type",
        deployment("spec.strategy", {"type": "Recreate"}),
    ),
    mutation("ready is enough", "minReadySeconds", deployment("spec.minReadySeconds", None)),
    mutation(
        "nothing to undo to", "revisionHistoryLimit", deployment("spec.revisionHistoryLimit", 0)
    ),
    mutation(
        "no patience", "progressDeadlineSeconds", deployment("spec.progressDeadlineSeconds", 30)
    ),
    mutation("no node can be drained", "PodDisruptionBudget", pdb("spec.maxUnavailable", 0)),
    mutation("a drain takes all", "PodDisruptionBudget", pdb("spec.maxUnavailable", "100%")),
    mutation(
        "as many must stay as there are",
        "PodDisruptionBudget",
        pdb("spec.maxUnavailable", None),
        pdb("spec.minAvailable", 3),
    ),
    mutation(
        "broken pods hold up a drain",
        "unhealthyPodEvictionPolicy",
        pdb("spec.unhealthyPodEvictionPolicy", None),
    ),
    mutation("no budget", "PodDisruptionBudget", remove("PodDisruptionBudget")),
    # API versions
    mutation("a budget of long ago", "policy/v1beta1", pdb("apiVersion", "policy/v1beta1")),
    mutation("an autoscaler of long ago", "v2beta2", hpa("apiVersion", "autoscaling/v2beta2")),
    # what a pod may do
    mutation("the default account", "serviceAccountName", pod("serviceAccountName", "default")),
    mutation("a token in the pod", "automount", pod("automountServiceAccountToken", True)),
    mutation(
        "a token by default",
        "automount",
        put("ServiceAccount", "automountServiceAccountToken", None),
    ),
    mutation(
        "addresses of all Services", "enableServiceLinks", job(f"{POD}.enableServiceLinks", None)
    ),
    mutation("privileged", "privileged", api("securityContext.privileged", True)),
    mutation(
        "more privileges than at the start",
        "allowPrivilegeEscalation",
        api("securityContext.allowPrivilegeEscalation", None),
    ),
    mutation(
        "a root to write to",
        "readOnlyRootFilesystem",
        api("securityContext.readOnlyRootFilesystem", False),
    ),
    mutation(
        "a capability", "capabilities", api("securityContext.capabilities.add", ["NET_ADMIN"])
    ),
    mutation("all capabilities", "capabilities", migrate("securityContext.capabilities", None)),
    mutation("root in the migration", "runAsUser", job(f"{POD}.securityContext.runAsUser", 0)),
    mutation("another user in the pod", "runAsUser", pod("securityContext.runAsUser", 1000)),
    mutation(
        "another group in the container", "runAsGroup", api("securityContext.runAsGroup", 1000)
    ),
    mutation("files of another group", "fsGroup", pod("securityContext.fsGroup", 2000)),
    mutation(
        "no seccomp", "seccompProfile", pod("securityContext.seccompProfile.type", "Unconfined")
    ),
    mutation("the host's network", "hostNetwork", pod("hostNetwork", True)),
    mutation(
        "a side-car that may do anything",
        "containers.1",
        pod("containers.-", {"name": "x", "image": "x"}),
    ),
    mutation("the default namespace", "default", put("Namespace", "metadata.name", "default")),
    mutation(
        "a namespace that lets anything in",
        "pod-security",
        label("Namespace", "metadata.labels", "pod-security.kubernetes.io/enforce", "baseline"),
    ),
    mutation(
        "an object elsewhere", "metadata.namespace", put("HTTPRoute", "metadata.namespace", "other")
    ),
    # the network
    mutation("all may leave", "policyTypes", policy("spec.policyTypes", ["Ingress"])),
    mutation("no network policy", "NetworkPolicy", remove("NetworkPolicy")),
    mutation("anybody may call", "spec.ingress.0", policy("spec.ingress.0.from", None)),
    mutation(
        "every namespace may call",
        "spec.ingress.0",
        policy("spec.ingress.0.from", [{"namespaceSelector": {}}]),
    ),
    mutation(
        "clients may read the metrics",
        "metrics",
        policy("spec.ingress.0.ports.-", {"port": "metrics", "protocol": "TCP"}),
    ),
    mutation("nobody can scrape them", "port metrics", policy("spec.ingress.1", None)),
    mutation(
        "pods may call anybody",
        "spec.egress.1",
        policy("spec.egress.1.to", [{"ipBlock": {"cidr": "0.0.0.0/0"}}]),
    ),
    mutation("pods may call on any port", "spec.egress.1", policy("spec.egress.1.ports", None)),
    mutation("no way to Postgres", "5432", policy("spec.egress.1.ports.0", None)),
    mutation("no way to Redis", "6379", policy("spec.egress.1.ports.1", None)),
    mutation("no names", "53", policy("spec.egress.0.ports.0", None)),
    mutation(
        "the migration is left out",
        "NetworkPolicy: spec.podSelector",
        label("NetworkPolicy", "spec.podSelector.matchLabels", NAME, "web"),
    ),
    # settings and secrets
    mutation("a setting that is none", "DRAIN_SECOND ", setting("DRAIN_SECOND", "10")),
    mutation("a value that is none", "DRAIN_SECONDS=soon", setting("DRAIN_SECONDS", "soon")),
    mutation("another ConfigMap", "envFrom", api("envFrom.0.configMapRef.name", "other")),
    mutation(
        "a ConfigMap without a hash",
        "hash",
        put("ConfigMap", "metadata.name", "config"),
        api("envFrom.0.configMapRef.name", "config"),
        migrate("envFrom.0.configMapRef.name", "config"),
    ),
    mutation("development in production", "ENVIRONMENT", setting("ENVIRONMENT", "development")),
    mutation(
        "a secret in the ConfigMap",
        "DATABASE_URL",
        setting("DATABASE_URL", "postgresql://app@postgres/app"),
    ),
    mutation(
        "a password in a variable",
        "password",
        api("env", [{"name": "REDIS_URL", "value": "redis://:hunter2@redis:6379/0"}]),
    ),
    mutation(
        "a secret in a variable",
        "DATABASE_URL",
        migrate(
            "env",
            [{"name": "DATABASE_URL", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
        ),
    ),
    mutation(
        "a password in an annotation",
        "password",
        job("metadata.annotations", {"note": "postgresql://app:hunter2@postgres/app"}),
    ),
    mutation(
        "a Secret in git",
        "Secret",
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
        "secrets elsewhere", "SECRETS_DIR", api("volumeMounts.2.mountPath", "/run/secrets/other")
    ),
    mutation(
        "settings look elsewhere", "SECRETS_DIR", setting("SECRETS_DIR", "/run/secrets/other")
    ),
    mutation(
        "a secret that is no setting",
        "database_uri",
        pod("volumes.2.projected.sources.0.secret.items.0.path", "database_uri"),
    ),
    mutation(
        "a secret less", "redis_url", pod("volumes.2.projected.sources.0.secret.items.1", None)
    ),
    mutation(
        "a secret more for the migration",
        "redis_url",
        job(
            f"{POD}.volumes.1.projected.sources.0.secret.items.-",
            {"key": "redis_url", "path": "redis_url"},
        ),
    ),
    # the image
    mutation("the latest image", "latest", api("image", "registry.example.com/service:latest")),
    mutation(
        "a tag alone",
        "kustomize edit set image",
        api("image", "registry.example.com/service:1.0.0"),
    ),
    mutation(
        "another image migrates",
        "image",
        migrate("image", f"registry.example.com/x:1@sha256:{'1' * 64}"),
    ),
    mutation("an image of the node's", "imagePullPolicy", api("imagePullPolicy", "IfNotPresent")),
    # the migration
    mutation("no migration", "Job", remove("Job")),
    mutation("Jobs pile up", "ttlSecondsAfterFinished", job("spec.ttlSecondsAfterFinished", None)),
    mutation(
        "a migration without an end",
        "activeDeadlineSeconds",
        job("spec.activeDeadlineSeconds", None),
    ),
    mutation("a migration that tries for ever", "backoffLimit", job("spec.backoffLimit", 100)),
    mutation("logs of tries are lost", "restartPolicy", job(f"{POD}.restartPolicy", "OnFailure")),
    mutation(
        "a shell hides the exit code",
        "command",
        migrate("command", ["sh", "-c", "alembic upgrade head; true"]),
    ),
    mutation(
        "the API is applied before the migration",
        "component",
        label("Deployment", "metadata.labels", COMPONENT, None),
    ),
    mutation(
        "the migration is applied with the API",
        "component",
        label("Job", "metadata.labels", COMPONENT, "api"),
    ),
    # the Dockerfile
    mutation("a name for a user", "USER", text("dockerfile", "USER 10001:10001", "USER app")),
    mutation("root", "USER", text("dockerfile", "USER 10001:10001", "USER 0:0")),
    mutation("no user", "USER", text("dockerfile", "USER 10001:10001\n", "")),
    mutation(
        "another user than the manifests'",
        "runAsUser",
        text("dockerfile", "USER 10001:10001", "USER 65532:65532"),
    ),
    mutation(
        "a shell is process 1", "CMD", text("dockerfile", '\nCMD ["gunicorn"]', "\nCMD gunicorn")
    ),
    mutation(
        "uvicorn alone",
        "CMD",
        text("dockerfile", '\nCMD ["gunicorn"]', '\nCMD ["uvicorn", "app.main:app"]'),
    ),
    mutation(
        "an entry point",
        "ENTRYPOINT",
        text("dockerfile", '\nCMD ["gunicorn"]', '\nENTRYPOINT ["sh"]\nCMD ["gunicorn"]'),
    ),
    mutation(
        "an end without a drain",
        "STOPSIGNAL",
        text("dockerfile", "STOPSIGNAL SIGTERM", "STOPSIGNAL SIGINT"),
    ),
    mutation(
        "health by curl",
        "HEALTHCHECK",
        text(
            "dockerfile", 'CMD ["python", "-m", "app.serving.healthcheck"]', "CMD curl -f localhost"
        ),
    ),
    mutation(
        "no migrations in the image",
        "migrations",
        text("dockerfile", "COPY migrations ./migrations\n", ""),
    ),
    mutation(
        "no alembic.ini in the image",
        "alembic.ini",
        text("dockerfile", "COPY alembic.ini gunicorn", "COPY gunicorn"),
    ),
    mutation(
        "tests in the image",
        "tests",
        text("dockerfile", "COPY app ./app\n", "COPY app ./app\nCOPY tests ./tests\n"),
    ),
    mutation(
        "development's packages in the image",
        "requirements-dev.txt",
        text(
            "dockerfile",
            "COPY requirements.txt /tmp/",
            "COPY requirements.txt requirements-dev.txt /tmp/",
        ),
    ),
    mutation("no hashes", "--require-hashes", text("dockerfile", "--require-hashes ", "")),
    mutation(
        "pip in the last stage",
        "last stage",
        text("dockerfile", "USER 10001:10001", "RUN pip install extra\nUSER 10001:10001"),
    ),
    mutation(
        "a variable that is no setting",
        "METRIC_BIND",
        text("dockerfile", "METRICS_BIND=", "METRIC_BIND="),
    ),
    # the pod, and what it may override of the image
    mutation("a shell in the pod", "command", api("command", ["sh", "-c", "gunicorn"])),
    mutation("more workers in the pod", "args", api("args", ["gunicorn", "--workers", "4"])),
    mutation("another folder", "workingDir", api("workingDir", "/")),
    mutation(
        "a probe that waits", "initialDelaySeconds", api("startupProbe.initialDelaySeconds", 300)
    ),
    mutation("a probe by TLS", "scheme", api("readinessProbe.httpGet.scheme", "HTTPS")),
    mutation("a probe of another host", "host", api("livenessProbe.httpGet.host", "example.com")),
    mutation(
        "ready after ten answers", "successThreshold", api("readinessProbe.successThreshold", 10)
    ),
    mutation(
        "who is not ready gets requests",
        "publishNotReady",
        service("spec.publishNotReadyAddresses", True),
    ),
    mutation(
        "a secret that may be missing",
        "optional",
        pod("volumes.2.projected.sources.0.secret.optional", True),
    ),
    mutation("everybody is believed", "FORWARDED_ALLOW_IPS", setting("FORWARDED_ALLOW_IPS", "*")),
    mutation("the migration waits for ever", "suspend", job("spec.suspend", True)),
    mutation("three migrations at once", "parallelism", job("spec.parallelism", 3)),
    mutation("the migration only prints", "args", migrate("args", ["--sql"])),
    mutation("a port of the node", "hostPort", api("ports.0.hostPort", 8000)),
    mutation(
        "a folder of the node",
        "hostPath",
        pod("volumes.-", {"name": "x", "hostPath": {"path": "/var"}}),
    ),
    mutation("a paused rollout", "paused", deployment("spec.paused", True)),
    mutation(
        "scaled out at once",
        "averageUtilization",
        hpa("spec.metrics.0.resource.target.averageUtilization", 70),
    ),
    mutation(
        "never scaled out", "selectPolicy", hpa("spec.behavior.scaleUp.selectPolicy", "Disabled")
    ),
    mutation(
        "two bases",
        "FROM",
        text(
            "dockerfile",
            "FROM docker.io/library/python:3.13-slim AS runtime",
            "FROM python:3.14-alpine AS runtime",
        ),
    ),
    mutation(
        "no packages in the image",
        "COPY",
        text("dockerfile", "COPY --from=builder /opt/venv /opt/venv\n", ""),
    ),
    mutation(
        "the packages are not on PATH",
        "PATH",
        text("dockerfile", "PATH=/opt/venv/bin:$PATH", "LANG=C"),
    ),
    mutation(
        "secrets in the image's context",
        ".secrets",
        text("dockerignore", "!app\n", "!app\n!.secrets\n"),
    ),
    # nginx, in compose
    mutation(
        "nginx does a POST twice",
        "non_idempotent",
        text("proxy", "error timeout;", "error non_idempotent;"),
    ),
    mutation(
        "nginx keeps a connection for an hour",
        "keepalive_timeout",
        text("proxy", "timeout 60s;", "timeout 1h;"),
    ),
    mutation(
        "nginx refuses bodies",
        "client_max_body_size",
        text("proxy", "body_size 2m;", "body_size 512k;"),
    ),
    mutation(
        "nginx refuses heads",
        "large_client_header",
        text("proxy", "buffers 4 32k;", "buffers 4 8k;"),
    ),
    # compose
    mutation(
        "compose lets the service take longer than nginx",
        "proxy_read_timeout",
        text("compose", "ENVIRONMENT: staging", "REQUEST_TIMEOUT_SECONDS: 60"),
    ),
    mutation(
        "a wrong value in compose",
        "ENVIRONMENT",
        text("compose", "ENVIRONMENT: staging", "ENVIRONMENT: x"),
    ),
    mutation(
        "a root that can be written to",
        "read_only",
        text("compose", "read_only: true", "read_only: false"),
    ),
    mutation(
        "capabilities in compose", "cap_drop", text("compose", "cap_drop: [ALL]", "cap_drop: []")
    ),
    mutation("root in compose", "root", text("compose", 'user: "999:999"', "user: root")),
    mutation(
        "a password in compose",
        "password",
        text("compose", "ENVIRONMENT: staging", "ENVIRONMENT: redis://:secret@redis"),
    ),
    mutation(
        "compose kills it while it drains",
        "stop_grace_period",
        text("compose", "stop_grace_period: 60s #", "#"),
    ),
    mutation(
        "compose sets what is no setting",
        "SECRET_DIR",
        text("compose", "SECRETS_DIR: /run", "SECRET_DIR: /run"),
    ),
    mutation(
        "Postgres in compose allows less",
        "max_connections",
        text("compose", "max_connections=200", "max_connections=50"),
    ),
    mutation(
        "compose believes everybody",
        "FORWARDED_ALLOW_IPS",
        text("compose", 'IPS: "${EDGE_NETWORK:-10.203.71}.10"', "IPS: '*'"),
    ),
    mutation(
        "compose is open to other machines",
        "127.0.0.1",
        text("compose", '"127.0.0.1:${HTTP', '"${HTTP'),
    ),
    mutation(
        "the context lacks the migrations",
        ".dockerignore",
        text("dockerignore", "!migrations\n", ""),
    ),
    mutation(
        "the context holds everything",
        ".dockerignore",
        text("dockerignore", "*\n!alembic", "!alembic"),
    ),
]
NOTHING = mutation("nothing at all", "")


def main() -> None:
    """Print, for each mutation, the faults that the contract finds."""
    from tests.deploy.checking import find_problems
    from tests.deploy.deployed import Deployed, read, with_every_component
    from tests.deploy.rules import RULES

    with tempfile.TemporaryDirectory() as folder:
        sound = vars(read("prod", with_every_component("prod", Path(folder, "k8s"))))
    found = {}
    for mutation in (NOTHING, *MUTATIONS):
        files = copy.deepcopy(sound)
        for change in mutation.changes:
            change(files)
        assert (files != sound) is bool(mutation.changes), mutation.what
        found[mutation.what] = [
            fault for rule in RULES for fault in find_problems(rule, Deployed(**files))
        ]
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
