"""Rules for compose.yaml and its nginx.conf: on one machine, too, the parts agree."""

import functools
import re
from typing import Any

import yaml

from app.settings import Settings
from tests.deploy.checking import Problems, rule, show
from tests.deploy.deployed import Deployed, Document, at, duration, has_reader, validate_settings
from tests.deploy.rules.secrets import UNREAD, find_passwords

NGINX_CONF = "deploy/compose/nginx.conf"
SIZES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
#: The default of nginx for its timeouts.
NGINX_TIMEOUT_SECONDS = 60
#: The default of compose.
STOP_GRACE_PERIOD = "10s"
#: A variable with its default, as compose reads it.
DEFAULT = re.compile(r"\$\{\w+:?-([^}]*)\}")
HARDENING = {"read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}


def services(d: Deployed) -> dict[str, Document]:
    """Return the services of compose.yaml and its overrides, with the defaults of variables."""
    found: dict[str, Document] = {}
    for text in (d.compose, *d.compose_overrides.values()):
        for name, service in read_services(text).items():
            found[name] = found.get(name, {}) | service
    return found


@functools.cache
def read_services(text: str) -> dict[str, Document]:
    """Return the services of one file, shared by all callers.

    Each rule reads them, and the files of all overlays are the same.
    """
    services: dict[str, Document] = yaml.safe_load(DEFAULT.sub(r"\1", text))["services"]
    return services


def place(d: Deployed, name: str) -> str:
    """Return the file of a service and its name, for a message."""
    for file, text in d.compose_overrides.items():
        if re.search(rf"^  {name}:$", text, re.MULTILINE) and f"\n  {name}:" not in d.compose:
            return f"{file}: {name}"
    return f"compose.yaml: {name}"


def settings(d: Deployed) -> Settings:
    """Return the settings of the API in compose.yaml. Raises `UnreadableError`."""
    environment: dict[str, Any] = services(d)["api"].get("environment") or {}
    return validate_settings("compose.yaml: api", environment)


@rule
def compose_variables_are_settings(d: Deployed) -> Problems:
    for name, service in services(d).items():
        if "COMPOSE_PROJECT_NAME" not in str(service.get("image")):
            continue  # an image of another project
        for variable in service.get("environment") or {}:
            if not has_reader(variable):
                yield (
                    f"{place(d, name)}: {variable} is not a setting of app/settings.py; {UNREAD}"
                )


@rule
def compose_lets_the_service_drain(d: Deployed) -> Problems:
    grace = settings(d).termination_grace_seconds
    for name, service in services(d).items():
        is_ours = "app.serving.healthcheck" in str(service.get("healthcheck"))
        period = str(service.get("stop_grace_period", STOP_GRACE_PERIOD))
        if is_ours and duration(period) < grace:
            yield (
                f"{place(d, name)}: stop_grace_period is {period}; set it to {grace}s, "
                "TERMINATION_GRACE_SECONDS, or the service is killed while it drains"
            )


@rule
def compose_postgres_has_the_declared_connections(d: Deployed) -> Problems:
    declared = settings(d).postgres_max_connections
    command = " ".join(services(d)["postgres"]["command"])
    match = re.search(r"max_connections=(\d+)", command)
    if not match or int(match[1]) != declared:
        yield (
            f"compose.yaml: postgres: max_connections is {match[1] if match else 'missing'}; "
            f"set it to POSTGRES_MAX_CONNECTIONS={declared}"
        )


@rule
def compose_restricts_every_container(d: Deployed) -> Problems:
    for name, service in services(d).items():
        for field, value in HARDENING.items():
            found = service.get(field)
            if found != value:
                yield (
                    f"{place(d, name)}: {field} is {show(found)}; set it to {value!r}, "
                    "as in x-hardened"
                )
        user = str(service.get("user", "")).partition(":")[0]
        if service.get("privileged") or user in {"0", "root"}:
            yield f"{place(d, name)}: runs as root or privileged; remove that"


@rule
def compose_is_reachable_from_this_machine_only(d: Deployed) -> Problems:
    for name, service in services(d).items():
        for port in service.get("ports", []):
            if not str(port).startswith("127.0.0.1:"):
                yield (
                    f"{place(d, name)}: ports has {port}; start it with 127.0.0.1:, or other "
                    "machines can connect"
                )


@rule
def compose_has_no_passwords(d: Deployed) -> Problems:
    for name, service in services(d).items():
        for path in find_passwords(service):
            yield f"{place(d, name)}: {path} has a password; move it to a file of `secrets`"


@rule
def compose_trusts_the_forwarded_headers_of_nginx_only(d: Deployed) -> Problems:
    trusted = settings(d).forwarded_allow_ips
    address = at(services(d), "nginx.networks.edge.ipv4_address")
    if trusted != address:
        yield (
            f"compose.yaml: api: FORWARDED_ALLOW_IPS is {trusted}; "
            f"set it to the address of nginx, {address}"
        )


@rule
def nginx_closes_idle_connections_before_the_service(d: Deployed) -> Problems:
    keepalive = settings(d).keepalive_seconds
    for upstream in re.findall(r"^\s*upstream\s+\S+\s*\{([^}]*)\}", d.proxy, re.MULTILINE):
        idle = shortest_timeout("keepalive_timeout", upstream)
        if idle >= keepalive:
            yield (
                f"{NGINX_CONF}: keepalive_timeout of the upstream is {idle:g} s; set it under "
                f"KEEPALIVE_SECONDS={keepalive}, or nginx reuses connections that are being closed"
            )


@rule
def nginx_waits_longer_than_the_request_timeout(d: Deployed) -> Problems:
    longest = settings(d).request_timeout_seconds
    timeout = shortest_timeout("proxy_read_timeout", d.proxy)
    if timeout <= longest:
        yield (
            f"{NGINX_CONF}: proxy_read_timeout is {timeout:g} s; "
            f"set it over REQUEST_TIMEOUT_SECONDS={longest:g}"
        )


@rule
def nginx_leaves_size_limits_to_the_service(d: Deployed) -> Problems:
    wanted = settings(d)
    for directive, setting, minimum in (
        ("client_max_body_size", "MAX_BODY_BYTES", wanted.max_body_bytes),
        ("large_client_header_buffers", "MAX_HEADER_BYTES", wanted.max_header_bytes),
    ):
        size = first_size(directive, d.proxy)
        if size is None or size < minimum:
            found = "missing" if size is None else f"{size} bytes"
            yield f"{NGINX_CONF}: {directive} is {found}; set it to {setting}={minimum} or more"


@rule
def nginx_never_repeats_a_post(d: Deployed) -> Problems:
    if "non_idempotent" in d.proxy:
        yield (
            f"{NGINX_CONF}: proxy_next_upstream has non_idempotent; remove it, or a POST may be "
            "processed twice"
        )


def shortest_timeout(directive: str, text: str) -> float:
    """Return the shortest value of a directive in seconds, or nginx' default."""
    values = re.findall(rf"^\s*{directive}\s+([\w ]+);", text, re.MULTILINE)
    return min(
        (duration(value.replace(" ", "")) for value in values), default=NGINX_TIMEOUT_SECONDS
    )


def first_size(directive: str, text: str) -> int | None:
    """Return the bytes of the first such directive, without the number of buffers, or None."""
    pattern = rf"^\s*{directive}(?:\s+\d+)?\s+(\d+)([kmg]?);"
    match = re.search(pattern, text, re.MULTILINE | re.IGNORECASE)
    return int(match[1]) * SIZES[match[2].lower()] if match else None
