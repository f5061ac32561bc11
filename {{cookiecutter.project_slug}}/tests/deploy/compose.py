"""Rules about compose.yaml: on one machine, too, the parts agree with each other and with the settings."""

import re

import yaml

from app.settings import Settings
from tests.deploy.deployed import Deployed, at
from tests.deploy.rules import Faults, rule


@rule
def compose_gives_what_the_settings_expect(d: Deployed) -> Faults:
    services = yaml.safe_load(d.compose)["services"]
    for name, service in services.items():
        if str(service.get("image", "")).startswith("${COMPOSE_PROJECT_NAME}"):
            for variable in service.get("environment", {}):
                if variable.lower() not in Settings.model_fields:
                    yield f"compose.yaml: {name}: {variable} is no setting; name one of app/settings.py, or remove it"
    environment = services["api"]["environment"]
    grace = int(environment.get("TERMINATION_GRACE_SECONDS", Settings().termination_grace_seconds))
    if str(found := services["api"].get("stop_grace_period")) != f"{grace}s":
        yield (
            f"compose.yaml: api: stop_grace_period is {found}; set it to {grace}s, which is TERMINATION_GRACE_SECONDS, "
            "or it is killed while it drains"
        )
    allowed = re.search(r"max_connections=(\d+)", " ".join(services["postgres"]["command"]))
    declared = environment.get("POSTGRES_MAX_CONNECTIONS", Settings().postgres_max_connections)
    if not allowed or int(allowed[1]) != int(declared):
        yield (
            f"compose.yaml: postgres: max_connections is {allowed and allowed[1]}, and POSTGRES_MAX_CONNECTIONS is "
            f"{declared}: make them agree"
        )


@rule
def compose_believes_nginx_alone(d: Deployed) -> Faults:
    services = yaml.safe_load(d.compose)["services"]
    address = at(services, "nginx.networks.edge.ipv4_address")
    if (found := at(services, "api.environment.FORWARDED_ALLOW_IPS")) != address:
        yield f"compose.yaml: api: FORWARDED_ALLOW_IPS is {found}; set it to nginx' address, {address}"
    for name, service in services.items():
        for port in service.get("ports", []):
            if not str(port).startswith("127.0.0.1:"):
                yield f"compose.yaml: {name}: ports has {port}; begin it with 127.0.0.1: other machines could reach it"
