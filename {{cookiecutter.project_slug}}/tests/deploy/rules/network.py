"""Rules for the network: ports, selectors, the Service, routes, and the network policy."""

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr

from app.setting_types import HostPort
from app.settings import Settings
from tests.deploy.checking import POD_LABELS, Problems, expect, rule, selects, show
from tests.deploy.deployed import POD, Deployed, Document, at, duration

#: For how long ingress-nginx, the load balancers of AWS and most others keep an idle connection,
#: unless configured.
INGRESS_KEEPALIVE_SECONDS = 60
ALL_INTERFACES = {"0.0.0.0", "::"}
ALL_ADDRESSES = {"0.0.0.0/0", "::/0"}
DEFAULT_PORTS = {"postgresql": 5432, "postgres": 5432, "redis": 6379, "rediss": 6379}
DEFAULT_PORTS |= {"http": 80, "https": 443, "amqp": 5672, "amqps": 5671}
#: Addresses of the pod itself, such as of a sidecar, which need no egress.
LOOPBACK = {"localhost", "127.0.0.1", "::1"}
#: The URL of a secret without a default, for its port.
SECRET_URLS: dict[str, str] = {"database_replica_url": "postgresql://standby/app"}
SECRET_URLS["amqp_url"] = "amqps://rabbitmq"  # jobs
#: Settings with URLs to which the service does not connect. Add yours here.
NO_CONNECTIONS = {"CORS_ALLOW_ORIGINS"}
MONITORING = {"kubernetes.io/metadata.name": "monitoring"}
ANTI_AFFINITY_TERM = (
    f"{POD}.affinity.podAntiAffinity"
    ".preferredDuringSchedulingIgnoredDuringExecution.0.podAffinityTerm"
)
#: The fields that must select the pods of the API and no others.
API_SELECTORS = (
    ("Deployment", "spec.selector.matchLabels"),
    ("Service", "spec.selector"),
    ("PodDisruptionBudget", "spec.selector.matchLabels"),
    ("Deployment", f"{POD}.topologySpreadConstraints.0.labelSelector.matchLabels"),
    ("Deployment", f"{ANTI_AFFINITY_TERM}.labelSelector.matchLabels"),
)

#: A port of a network policy, by name or number, and its protocol.
Port = tuple[Any, str]


@rule
def container_ports_are_those_of_the_settings(d: Deployed) -> Problems:
    ports = {port.get("name"): port.get("containerPort") for port in d.api.get("ports", [])}
    for name, setting, address in (
        ("http", "BIND", HostPort(d.gunicorn["bind"])),
        ("metrics", "METRICS_BIND", d.settings.metrics_bind),
    ):
        if ports.get(name) != address.port:
            yield (
                f"Deployment: the port {name!r} is {show(ports.get(name))} and {setting} is "
                f"{address}; set both to the same port"
            )
        if address.host not in ALL_INTERFACES:
            yield (
                f"ConfigMap: {setting}={address} accepts no connections from outside of the pod; "
                f"set it to 0.0.0.0:{address.port}"
            )


@rule
def connections_stay_open_longer_than_the_ingress_keeps_them(d: Deployed) -> Problems:
    keepalive = d.gunicorn["keepalive"]
    if keepalive <= INGRESS_KEEPALIVE_SECONDS:
        yield (
            f"ConfigMap: KEEPALIVE_SECONDS is {keepalive}; set it over {INGRESS_KEEPALIVE_SECONDS},"
            " the idle timeout of most ingresses, or they reuse connections that are being closed"
        )


@rule
def routes_wait_longer_than_the_request_timeout(d: Deployed) -> Problems:
    longest = d.settings.request_timeout_seconds
    for route in d.all("HTTPRoute"):
        for number in range(len(at(route, "spec.rules") or [])):
            path = f"spec.rules.{number}.timeouts.request"
            timeout = at(route, path)
            # 0s switches the timeout off.
            if not timeout or 0 < duration(str(timeout)) <= longest:
                yield (
                    f"HTTPRoute: {path} is {show(timeout)}; "
                    f"set it over REQUEST_TIMEOUT_SECONDS={longest:g}"
                )


@rule
def selectors_match_the_pods_of_the_api_only(d: Deployed) -> Problems:
    deployment = d.one("Deployment")
    labels = at(deployment, POD_LABELS) or {}
    others = [document for document in d.pods if document is not deployment]
    for kind, path in API_SELECTORS:
        selector = at(d.one(kind), path)
        prefix = f"{kind}: {path} is {show(selector)}"
        if not selector or not selects(selector, labels):
            yield f"{prefix}; set it to labels of the API's pods, which are {labels}"
        elif any(selects(selector, at(other, POD_LABELS)) for other in others):
            yield f"{prefix}; add the component: it matches the pods of the migration, too"


@rule
def network_policy_applies_to_all_pods(d: Deployed) -> Problems:
    selector = at(d.one("NetworkPolicy"), "spec.podSelector.matchLabels")
    for document in d.pods:
        if not selects(selector, at(document, POD_LABELS)):
            yield (
                f"NetworkPolicy: spec.podSelector is {show(selector)}; "
                f"make it match the pods of the {document['kind']}, too"
            )


@rule
def service_forwards_to_the_named_ports_of_ready_pods(d: Deployed) -> Problems:
    service = d.one("Service")
    why = "clients come in through a route or an ingress"
    yield from expect(service, "spec", why, type="ClusterIP")
    why = "pods that start or drain must not get requests"
    yield from expect(service, "spec", why, publishNotReadyAddresses=None)
    ports = _service_ports(service)
    for name in ("http", "metrics"):
        port = ports.get(name) or {}
        if port.get("targetPort") != name or port.get("appProtocol") != "http":
            yield (
                f"Service: the port {name!r} is {show(ports.get(name))}; "
                f"set targetPort to {name} and appProtocol to http"
            )


@rule
def routes_and_monitors_lead_to_the_service(d: Deployed) -> Problems:
    service = d.one("Service")
    port = at(_service_ports(service), "http.port")
    backend = {"name": service["metadata"]["name"], "port": port}
    for route in d.all("HTTPRoute"):
        yield from expect(route, "spec.rules.0", "it is the Service", backendRefs=[backend])
    for monitor in d.all("ServiceMonitor"):
        why = "the Service has the metrics there"
        yield from expect(monitor, "spec.endpoints.0", why, port="metrics", path="/metrics")
        selector = at(monitor, "spec.selector.matchLabels")
        labels = at(service, "metadata.labels")
        if not selects(selector, labels):
            yield (
                f"ServiceMonitor: spec.selector is {show(selector)}; "
                f"set it to labels of the Service, which are {labels}"
            )


def _service_ports(service: Document) -> dict[str | None, Document]:
    """Return the ports of a Service by their name."""
    return {port.get("name"): port for port in at(service, "spec.ports") or []}


@rule
def network_policy_allows_the_needed_ports(d: Deployed) -> Problems:
    policy = d.one("NetworkPolicy")
    why = "both directions are closed, but for the listed ports"
    yield from expect(policy, "spec", why, policyTypes=["Ingress", "Egress"])
    needed: dict[str, set[Port]] = {
        "ingress": {("http", "TCP"), ("metrics", "TCP")},
        "egress": {(53, "UDP"), (53, "TCP")},
    }
    for direction, ports in needed.items():
        allowed: set[Port] = set()
        for entry in at(policy, f"spec.{direction}") or []:
            allowed |= _entry_ports(entry)
        for port, protocol in sorted(ports - allowed, key=str):
            yield (
                f"NetworkPolicy: spec.{direction} does not allow {protocol} port {port}; "
                "add it: the service needs it"
            )


@rule
def network_policy_names_peers_and_ports(d: Deployed) -> Problems:
    for place, peers, ports in _policy_entries(d):
        if not ports or not peers or any(not any(peer.values()) for peer in peers):
            yield f"{place} has no ports or no peers, which means all; list both"
        if any(_is_everybody(peer) for peer in peers):
            yield (
                f"{place} allows all addresses; list namespaces or ranges, or exclude the private "
                "ranges with `except`"
            )


@rule
def network_policy_shows_metrics_to_monitoring_only(d: Deployed) -> Problems:
    for place, peers, ports in _policy_entries(d):
        selectors = [at(peer, "namespaceSelector.matchLabels") for peer in peers]
        is_open = any(selector != MONITORING for selector in selectors)
        if ("metrics", "TCP") in ports and is_open:
            yield f"{place} shows the metrics to other namespaces; list only `monitoring`"


@rule
def network_policy_allows_the_port_of_every_url(d: Deployed) -> Problems:
    """Of each variable and secret file, such as `GATEWAY_URL` or `HTTPS_PROXY`.

    One pod suffices: all pods share the ConfigMap, and the egress of some is their own.
    """
    allowed: dict[tuple[str, int], bool] = {}
    for document in d.pods:
        entries = list(_egress_entries(d, at(document, POD_LABELS)))
        for name, port in _url_ports(d, document):
            is_allowed = any(_allows(entry, port) for entry in entries)
            allowed[name, port] = allowed.get((name, port), False) or is_allowed
    for (name, port), is_allowed in sorted(allowed.items()):
        if not is_allowed:
            yield (
                f"NetworkPolicy: spec.egress does not allow TCP port {port} of {name}; add it, as "
                "in the components egress-*"
            )


def _url_ports(d: Deployed, document: Document) -> Iterator[tuple[str, int]]:
    """Yield the name and the port of each URL to which a pod connects."""
    local = ("", *LOOPBACK)
    for name, url in d.environment(document).items():
        if name not in NO_CONNECTIONS:
            yield from ((name, port) for host, port in _addresses(url) if host not in local)
    for file, secret in d.secrets(document).items():
        name = file.upper()
        url = _default_url(file) if secret is None else secret
        yield from ((name, port) for host, port in _addresses(url))


def _default_url(name: str) -> str:
    """Return the default of a secret, whose port counts if the overlay does not hold the secret."""
    field = Settings.model_fields.get(name.lower())
    default = field.default if field else None
    url = default.get_secret_value() if isinstance(default, SecretStr) else ""
    return url or SECRET_URLS.get(name.lower(), "")


def _addresses(text: str) -> Iterator[tuple[str, int]]:
    """Yield each host of a URL with its port; nothing of other texts. Postgres may have several."""
    scheme, separator, rest = text.partition("://")
    if not separator or not scheme.isalnum():
        return
    hosts = re.split(r"[/?#]", rest)[0].rpartition("@")[2]
    for host in hosts.split(","):
        address = urlsplit(f"//{host}")
        port = address.port or DEFAULT_PORTS.get(scheme)
        if port:
            yield address.hostname or "", port


def _egress_entries(d: Deployed, labels: Mapping[str, str] | None) -> Iterator[Document]:
    """Yield the egress entries of all network policies that apply to pods with these labels."""
    for policy in d.all("NetworkPolicy"):
        if selects(at(policy, "spec.podSelector.matchLabels"), labels):
            yield from at(policy, "spec.egress") or []


def _allows(entry: Document, number: int) -> bool:
    """Return whether an entry of a network policy allows a TCP port, or has no ports."""
    ports = entry.get("ports")
    if not ports:
        return True
    for port in ports:
        first = port.get("port")
        last = port.get("endPort", first)
        is_tcp = port.get("protocol", "TCP") == "TCP"
        if is_tcp and isinstance(first, int) and first <= number <= last:
            return True
    return False


def _policy_entries(d: Deployed) -> Iterator[tuple[str, list[Document], set[Port]]]:
    """Yield the place, the peers and the ports of each entry of the network policy."""
    policy = d.one("NetworkPolicy")
    for direction, peers in (("ingress", "from"), ("egress", "to")):
        for number, entry in enumerate(at(policy, f"spec.{direction}") or []):
            place = f"NetworkPolicy: spec.{direction}.{number}"
            yield place, entry.get(peers) or [], _entry_ports(entry)


def _entry_ports(entry: Document) -> set[Port]:
    ports = entry.get("ports") or []
    return {(port.get("port"), port.get("protocol", "TCP")) for port in ports}


def _is_everybody(peer: Document) -> bool:
    block = peer.get("ipBlock") or {}
    return block.get("cidr") in ALL_ADDRESSES and not block.get("except")
