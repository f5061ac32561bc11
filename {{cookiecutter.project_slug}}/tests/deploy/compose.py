"""Rules about compose.yaml and its nginx.conf: on one machine, too, the parts agree with the settings."""

import re
from typing import Any

import yaml
from pydantic import ValidationError

from app.settings import Settings
from tests.deploy.deployed import Deployed, UnreadableError, at, duration
from tests.deploy.objects import PASSWORD, texts
from tests.deploy.rules import Faults, rule

PROXY = "deploy/compose/nginx.conf"
SIZES = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
#: A variable with its default, as compose reads it.
DEFAULT = re.compile(r"\$\{\w+:?-([^}]*)\}")


def services(d: Deployed) -> dict[str, Any]:
    """Return the services of compose.yaml, with the defaults of its variables."""
    found: dict[str, Any] = yaml.safe_load(DEFAULT.sub(r"\1", d.compose))["services"]
    return found


def settings(d: Deployed) -> Settings:
    """Return the settings of the service in compose.yaml. Raises `UnreadableError` for those that are wrong."""
    environment = services(d)["api"].get("environment") or {}
    try:
        return Settings(
            **{name.lower(): value for name, value in environment.items() if name != "SECRETS_DIR"}
        )
    except ValidationError as error:
        faults = (
            f"{str(fault['loc'][0]).upper()}={fault['input']}: {fault['msg']}"
            for fault in error.errors()
        )
        msg = f"compose.yaml: api: {'; '.join(faults)}"
        raise UnreadableError(msg) from None


@rule
def compose_gives_what_the_settings_expect(d: Deployed) -> Faults:
    found, wanted = services(d), settings(d)
    for name, service in found.items():
        for variable in (
            service.get("environment") or {}
            if "COMPOSE_PROJECT_NAME" in str(service.get("image"))
            else ()
        ):
            if variable.lower() not in Settings.model_fields:
                yield f"compose.yaml: {name}: {variable} is no setting; name one of app/settings.py, or remove it"
    for name, service in found.items():
        stop, grace = str(service.get("stop_grace_period", "10s")), wanted.termination_grace_seconds
        if "app.serving.healthcheck" in str(service.get("healthcheck")) and duration(stop) < grace:
            yield (
                f"compose.yaml: {name}: stop_grace_period is {stop}; set it to {grace}s, which is "
                "TERMINATION_GRACE_SECONDS, or it is killed while it drains"
            )
    allowed = re.search(r"max_connections=(\d+)", " ".join(found["postgres"]["command"]))
    if not allowed or int(allowed[1]) != wanted.postgres_max_connections:
        yield (
            f"compose.yaml: postgres: max_connections is {allowed and allowed[1]}, and POSTGRES_MAX_CONNECTIONS is "
            f"{wanted.postgres_max_connections}: make them agree"
        )


@rule
def compose_restricts_every_container(d: Deployed) -> Faults:
    for name, service in services(d).items():
        wanted = {
            "read_only": True,
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges:true"],
        }
        for field, value in wanted.items():
            if service.get(field) != value:
                yield f"compose.yaml: {name}: {field} is {service.get(field)}; set it to {value}, as in x-hardened"
        if service.get("privileged") or str(service.get("user", "")).partition(":")[0] in {
            "0",
            "root",
        }:
            yield f"compose.yaml: {name}: runs as root or privileged; remove that"
        for port in service.get("ports", []):
            if not str(port).startswith("127.0.0.1:"):
                yield f"compose.yaml: {name}: ports has {port}; begin it with 127.0.0.1: other machines could reach it"
        for path in (path for path, text in texts(service) if PASSWORD.search(text)):
            yield f"compose.yaml: {name}: {path} holds a password; name a file below `secrets`"


@rule
def compose_believes_nginx_alone(d: Deployed) -> Faults:
    found, address = (
        settings(d).forwarded_allow_ips,
        at(services(d), "nginx.networks.edge.ipv4_address"),
    )
    if found != address:
        yield f"compose.yaml: api: FORWARDED_ALLOW_IPS is {found}; set it to nginx' address, {address}"


@rule
def nginx_waits_for_answers_and_lets_go_of_connections_first(d: Deployed) -> Faults:
    wanted = settings(d)
    for upstream in re.findall(r"^\s*upstream\s+\S+\s*\{([^}]*)\}", d.proxy, re.MULTILINE):
        if (idle := seconds("keepalive_timeout", upstream)) >= wanted.keepalive_seconds:
            yield (
                f"{PROXY}: keepalive_timeout of the upstream is {idle:g} s; set it under KEEPALIVE_SECONDS="
                f"{wanted.keepalive_seconds}, or nginx sends into connections that we are closing"
            )
    if (waits := seconds("proxy_read_timeout", d.proxy)) <= (
        longest := wanted.request_timeout_seconds
    ):
        yield f"{PROXY}: proxy_read_timeout is {waits:g} s; set it over REQUEST_TIMEOUT_SECONDS={longest:g}"


@rule
def nginx_lets_the_service_refuse_and_sends_nothing_twice(d: Deployed) -> Faults:
    wanted = settings(d)
    for directive, setting, least in (
        ("client_max_body_size", "MAX_BODY_BYTES", wanted.max_body_bytes),
        (r"large_client_header_buffers\s+\d+", "MAX_HEADER_BYTES", wanted.max_header_bytes),
    ):
        found = re.search(
            rf"^\s*{directive}\s+(\d+)([kmg]?);", d.proxy, re.MULTILINE | re.IGNORECASE
        )
        if not found or int(found[1]) * SIZES.get(found[2].lower(), 1) < least:
            name = directive.partition("\\")[0]
            yield f"{PROXY}: {name} is {found and found[0].strip()}; set it to {setting}={least} at least"
    if "non_idempotent" in d.proxy:
        yield f"{PROXY}: proxy_next_upstream has non_idempotent; remove it: a POST would be done twice"


def seconds(directive: str, text: str) -> float:
    """Return the shortest time that nginx is told with a directive, or its default of 60 s."""
    found = re.findall(rf"^\s*{directive}\s+([\w ]+);", text, re.MULTILINE)
    return min((duration(value.replace(" ", "")) for value in found), default=60)
