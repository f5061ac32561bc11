"""Rules about objects that have to find each other, and about what a pod may do: labels, users, network, secrets."""

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr

from app.settings import Settings
from tests.deploy.deployed import Deployed, Document, at, component
from tests.deploy.rules import CONTAINER, LABELS, POD, Faults, bounded, expect, matches, rule

API_VERSIONS = {
    "Namespace": "v1",
    "ServiceAccount": "v1",
    "ConfigMap": "v1",
    "Service": "v1",
    "Deployment": "apps/v1",
    "Job": "batch/v1",
    "HorizontalPodAutoscaler": "autoscaling/v2",
    "PodDisruptionBudget": "policy/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
}
OPTIONAL = {
    "HTTPRoute": "gateway.networking.k8s.io/v1",
    "ServiceMonitor": "monitoring.coreos.com/v1",
}
#: What the migration needs too. It is applied first: docs/runbook.md selects it by the label that it does not have.
SHARED = {"Namespace", "ServiceAccount", "ConfigMap", "Secret", "NetworkPolicy"}
COMPONENT = "app.kubernetes.io/component"
SECRETS = {
    name for name, field in Settings.model_fields.items() if isinstance(field.default, SecretStr)
}
SETTINGS = {name.upper() for name in Settings.model_fields}
PASSWORD = re.compile(r"://[^/\s:@]*:[^/@\s]+@")
EVERYBODY = ("0.0.0.0/0", "::/0")
ENVIRONMENTS = {"dev": "development", "staging": "staging"}  # all others are production


@rule
def every_kind_is_there_with_its_current_api_version(d: Deployed) -> Faults:
    for kind, version in (API_VERSIONS | OPTIONAL).items():
        if kind not in OPTIONAL and not d.all(kind):
            yield f"{kind}: is missing; add its file to the resources of base/kustomization.yaml"
        for document in d.all(kind):
            yield from expect(
                document, "", "Kubernetes 1.31 and newer serve it", apiVersion=version
            )


@rule
def everything_is_in_one_namespace_that_restricts_pods(d: Deployed) -> Faults:
    space = d.one("Namespace")
    if (name := space["metadata"]["name"]) == "default":
        yield "Namespace: metadata.name is 'default'; set `namespace` in the overlay's kustomization.yaml"
    for mode in ("enforce", "audit", "warn"):
        label = f"pod-security.kubernetes.io/{mode}"
        if (found := (at(space, "metadata.labels") or {}).get(label)) != "restricted":
            yield f"Namespace: the label {label} is {found!r}; set it to 'restricted'"
    for document in d.documents:
        if document is not space:
            yield from expect(document, "metadata", "it is the overlay's", namespace=name)


@rule
def the_migration_can_be_applied_before_the_rest(d: Deployed) -> Faults:
    for document in d.documents:
        kind, found, why = (
            document["kind"],
            component(document),
            "docs/runbook.md applies by it what has its turn",
        )
        if kind in SHARED and found:
            yield f"{kind}: the label {COMPONENT} is {found!r}; remove it: {why}"
        elif kind not in SHARED and (not found or (found == "migrate") is not (kind == "Job")):
            yield f"{kind}: the label {COMPONENT} is {found!r}; set it to migrate for a Job, or else to api: {why}"


@rule
def pods_have_an_account_of_their_own_and_no_token(d: Deployed) -> Faults:
    account = d.one("ServiceAccount")
    off = {"automountServiceAccountToken": False}
    yield from expect(account, "", "nothing here talks to the Kubernetes API", **off)
    for document in d.pods:
        why = "nothing here talks to the Kubernetes API, or needs the addresses of all Services"
        name = account["metadata"]["name"]
        yield from expect(
            document, POD, why, serviceAccountName=name, enableServiceLinks=False, **off
        )


@rule
def pods_run_as_the_user_of_the_image_and_may_nothing_else(d: Deployed) -> Faults:
    user, _, group = d.instruction("USER").partition(":")
    if not (user.isdigit() and user == group != "0"):
        yield f"Dockerfile: USER is {d.instruction('USER')!r}; set one number for user and group, such as 10001:10001"
        return
    same, number = "it is the USER of the Dockerfile", int(user)
    identity = {"runAsNonRoot": True, "runAsUser": number, "runAsGroup": number}
    nothing = {
        "privileged": False,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
    }
    for document in d.pods:
        context = f"{POD}.securityContext"
        yield from expect(document, context, same, **identity, fsGroup=number)
        why = "Pod Security `restricted` asks for it"
        yield from expect(document, context, why, seccompProfile__type="RuntimeDefault")
        yield from expect(document, POD, why, hostNetwork=None, hostPID=None, hostIPC=None)
        for volume in at(document, f"{POD}.volumes") or []:
            if "hostPath" in volume:
                yield f"{document['kind']}: {POD}.volumes: {volume['name']} is a hostPath; remove it: {why}"
        for place in d.containers(document):
            if any("hostPort" in port for port in at(document, f"{place}.ports") or []):
                yield f"{document['kind']}: {place}.ports has a hostPort; remove it: {why}"
            context = f"{place}.securityContext"
            yield from expect(document, context, same, **identity)
            yield from expect(document, context, why, **nothing, capabilities={"drop": ["ALL"]})


@rule
def the_image_is_pinned_and_the_same_everywhere(d: Deployed) -> Faults:
    pinned, pull = r"\S+:(?!latest@)[\w.-]+@sha256:[0-9a-f]{64}", "Always"
    if d.overlay == "dev":
        pinned, pull = r"\S+:(?!latest$)[\w.-]+", "IfNotPresent"
    for document in d.pods:
        image = d.container(document).get("image")
        if not re.fullmatch(pinned, re.sub(r"\{+ [\w.]+ \}+", "service", str(image))):
            yield f"{document['kind']}: image is {image!r}; pin it in the overlay: `kustomize edit set image`"
        if image != d.api.get("image"):
            yield f"{document['kind']}: image is {image!r}, but the API's is {d.api.get('image')!r}: make them the same"
        yield from expect(
            document,
            CONTAINER,
            "otherwise the node's image is not the one that is meant",
            imagePullPolicy=pull,
        )


@rule
def selectors_take_the_pods_that_they_are_meant_for(d: Deployed) -> Faults:
    deployment, labels = d.one("Deployment"), at(d.one("Deployment"), LABELS) or {}
    others = [document for document in d.pods if document is not deployment]
    apart = f"{POD}.affinity.podAntiAffinity.preferredDuringSchedulingIgnoredDuringExecution.0.podAffinityTerm"
    for kind, path in (
        ("Deployment", "spec.selector.matchLabels"),
        ("Service", "spec.selector"),
        ("PodDisruptionBudget", "spec.selector.matchLabels"),
        ("Deployment", f"{POD}.topologySpreadConstraints.0.labelSelector.matchLabels"),
        ("Deployment", f"{apart}.labelSelector.matchLabels"),
    ):
        selector = at(d.one(kind), path)
        if not selector or not matches(selector, labels):
            yield f"{kind}: {path} is {selector}; set it to labels of the API's pods, which are {labels}"
        elif any(matches(selector, at(other, LABELS)) for other in others):
            yield f"{kind}: {path} is {selector}; add the component: it takes the migration's pods too"
    selector = at(d.one("NetworkPolicy"), "spec.podSelector.matchLabels")
    for document in d.pods:
        if not matches(selector, at(document, LABELS)):
            yield f"NetworkPolicy: spec.podSelector is {selector}; widen it, for pods of the {document['kind']}"


@rule
def pods_are_spread_where_there_is_room(d: Deployed) -> Faults:
    deployment = d.one("Deployment")
    zone = {"topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway"}
    yield from expect(
        deployment,
        f"{POD}.topologySpreadConstraints.0",
        "over zones, but never pending for it",
        **zone,
    )
    apart: dict[str, Any] = {"requiredDuringSchedulingIgnoredDuringExecution": None}
    apart["preferredDuringSchedulingIgnoredDuringExecution__0__podAffinityTerm__topologyKey"] = (
        "kubernetes.io/hostname"
    )
    yield from expect(
        deployment,
        f"{POD}.affinity.podAntiAffinity",
        "over nodes, but never pending for it",
        **apart,
    )


@rule
def service_routes_and_monitors_lead_to_the_pods(d: Deployed) -> Faults:
    service, found = (
        d.one("Service"),
        {port.get("name"): port for port in at(d.one("Service"), "spec.ports") or []},
    )
    yield from expect(service, "spec", "a route or an ingress is the way in", type="ClusterIP")
    yield from expect(
        service, "spec", "a pod that drains or starts gets requests", publishNotReadyAddresses=None
    )
    for name in ("http", "metrics"):
        if (at(found, f"{name}.targetPort"), at(found, f"{name}.appProtocol")) != (name, "http"):
            yield f"Service: the port {name!r} is {found.get(name)}; set targetPort to {name}, and appProtocol to http"
    backend = {"name": service["metadata"]["name"], "port": at(found, "http.port")}
    for route in d.all("HTTPRoute"):
        yield from expect(route, "spec.rules.0", "it is the Service", backendRefs=[backend])
    for monitor in d.all("ServiceMonitor"):
        yield from expect(
            monitor,
            "spec.endpoints.0",
            "the Service shows them there",
            port="metrics",
            path="/metrics",
        )
        if not matches(at(monitor, "spec.selector.matchLabels"), at(service, "metadata.labels")):
            yield "ServiceMonitor: spec.selector does not take the Service; set it to labels of that"


@rule
def the_network_policy_lets_through_what_is_needed_and_no_more(d: Deployed) -> Faults:
    policy, settings = d.one("NetworkPolicy"), d.settings
    yield from expect(
        policy, "spec", "what is not named is refused, both ways", policyTypes=["Ingress", "Egress"]
    )
    urls = ((settings.database_url, 5432), (settings.redis_url, 6379))
    stores = {(urlsplit(url.get_secret_value()).port or port, "TCP") for url, port in urls}
    ways = (
        ("ingress", "from", {("http", "TCP"), ("metrics", "TCP")}),
        ("egress", "to", {(53, "UDP"), (53, "TCP"), *stores}),
    )
    for way, peers, needed in ways:
        opened = set()
        for number, entry in enumerate(at(policy, f"spec.{way}") or []):
            ports = {
                (port.get("port"), port.get("protocol", "TCP")) for port in entry.get("ports") or []
            }
            opened |= ports
            yield from _strangers(
                f"NetworkPolicy: spec.{way}.{number}", entry.get(peers) or [], ports
            )
        for port, protocol in sorted(needed - opened, key=str):
            yield f"NetworkPolicy: spec.{way} does not let {protocol} port {port} through; add it: the service needs it"


def _strangers(place: str, peers: list[Document], ports: set[tuple[Any, str]]) -> Faults:
    if not ports or not peers or any(not any(peer.values()) for peer in peers):
        yield f"{place} names no ports, or nobody, which is everybody; name both"
    if any(
        at(peer, "ipBlock.cidr") in EVERYBODY and not at(peer, "ipBlock.except") for peer in peers
    ):
        yield f"{place} names everybody; name namespaces or ranges, or leave the private ones out with `except`"
    monitoring = {"kubernetes.io/metadata.name": "monitoring"}
    if ("metrics", "TCP") in ports and any(
        at(peer, "namespaceSelector.matchLabels") != monitoring for peer in peers
    ):
        yield f"{place} shows the metrics to others than the namespace `monitoring`; name that alone"


@rule
def every_variable_is_a_setting(d: Deployed) -> Faults:
    for document in d.pods:
        for name in sorted(d.environment(document).keys() - SETTINGS):
            yield f"ConfigMap: {name} is no setting of app/settings.py, so it changes nothing: mend it, or remove it"
        for source in d.container(document).get("envFrom", []):
            if not re.search(r"-[a-z0-9]{10}$", name := str(at(source, "configMapRef.name"))):
                yield f"ConfigMap: {name} has no hash in its name, so a change is no rollout: use configMapGenerator"
    for name in sorted(d.image_environment.keys() - SETTINGS):
        if not re.fullmatch(r"PATH|PYTHON\w+|(LD|MALLOC)_\w+", name):
            yield f"Dockerfile: ENV {name} is no setting of app/settings.py: mend its name, or remove it"
    if "*" in d.settings.forwarded_allow_ips:
        yield "ConfigMap: FORWARDED_ALLOW_IPS is *; name the proxies: anybody could call himself any client"
    if d.settings.environment != (wanted := ENVIRONMENTS.get(d.overlay, "production")):
        yield f"ConfigMap: ENVIRONMENT is {d.settings.environment}; set it to {wanted} in the overlay"


@rule
def secrets_are_files_and_stand_nowhere_else(d: Deployed) -> Faults:
    for document in d.pods:
        kind, needed = (
            document["kind"],
            SECRETS if component(document) != "migrate" else {"database_url"},
        )
        if (found := set(d.secrets(document))) != needed:
            yield f"{kind}: {POD}.volumes: the secret files are {sorted(found)}; set {sorted(needed)}, which it needs"
        for volume in d.secret_volumes(document):
            why = "without it the pod starts with the default URLs, and says that localhost is away"
            yield from expect(
                {"kind": kind, **volume}, "projected.sources.0.secret", why, optional=None
            )
        variables, names = (
            d.environment(document),
            {volume["name"] for volume in d.secret_volumes(document)},
        )
        mounts = [
            mount
            for mount in d.container(document).get("volumeMounts", [])
            if mount["name"] in names
        ]
        if [(mount["mountPath"], mount.get("readOnly")) for mount in mounts] != [
            (variables.get("SECRETS_DIR"), True)
        ]:
            folder = variables.get("SECRETS_DIR")
            yield f"{kind}: the secrets are mounted as {mounts}; mount them at SECRETS_DIR={folder} only, readOnly"
        for name in sorted(name for name in variables if name.lower() in SECRETS):
            yield f"{kind}: the variable {name} is a secret; remove it: SECRETS_DIR has a file for it"
    for document in d.documents:
        if document["kind"] != "Secret":
            for path in (path for path, text in texts(document) if PASSWORD.search(text)):
                yield f"{document['kind']}: {path} holds a password; move it into the Secret"
        elif d.overlay != "dev":
            yield f"Secret: {d.overlay} holds one; remove it from git: docs/runbook.md creates it"


def texts(document: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield each text of a document with its path."""
    if isinstance(document, str):
        yield path.removeprefix("."), document
    for key, value in document.items() if isinstance(document, dict) else ():
        yield from texts(value, f"{path}.{key}")
    for number, value in enumerate(document) if isinstance(document, list) else ():
        yield from texts(value, f"{path}.{number}")


@rule
def the_migration_ends_and_is_cleared_away(d: Deployed) -> Faults:
    job = d.one("Job")
    yield from expect(
        job,
        CONTAINER,
        "no shell hides its exit code",
        command=["alembic", "upgrade", "head"],
        args=None,
    )
    yield from expect(
        job, "spec", "it runs once, and at once", suspend=None, parallelism=None, completions=None
    )
    yield from expect(job, POD, "each try keeps its log", restartPolicy="Never")
    yield from bounded(job, "spec.backoffLimit", 0, 5, "it does not try for ever")
    yield from bounded(
        job, "spec.activeDeadlineSeconds", 60, 3600, "a migration that waits for a lock ends"
    )
    yield from bounded(
        job, "spec.ttlSecondsAfterFinished", 60, 86400, "its log can be read, and then it goes"
    )
