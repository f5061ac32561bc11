"""Rules for settings and secrets: every variable is a setting, every secret is a file."""

import re
from collections.abc import Iterator
from typing import Any

from pydantic import SecretStr

from app.settings import Settings
from tests.deploy.checking import Problems, expect, rule
from tests.deploy.deployed import (
    POD,
    Deployed,
    Document,
    at,
    component,
    has_reader,
    required_sources,
    secret_data,
)

SECRETS = {
    name for name, field in Settings.model_fields.items() if isinstance(field.default, SecretStr)
}
#: Secrets that every pod has, and those of some pods, which work without them as well.
NEEDED = {name for name in SECRETS if Settings.model_fields[name].default.get_secret_value()}
OPTIONAL = SECRETS - NEEDED
#: Those of the pods that use less, by component.
NEEDED_BY = {"migrate": {"database_url"}}
NEEDED_BY["jobs"] = {"database_url"}  # jobs
#: Those that the pods of the API may have.
OPTIONAL_OF_API = {"database_replica_url"}
#: The remedy for a variable without an effect.
UNREAD = "correct its name, remove it, or add it to FOREIGN_VARIABLES of tests/deploy/deployed.py"
#: A URL with a password.
PASSWORD = re.compile(r"://[^/\s:@]*:[^/@\s]+@")
#: ENVIRONMENT of an overlay. All others are production.
ENVIRONMENTS = {"dev": "development", "staging": "staging"}


@rule
def every_variable_is_a_setting(d: Deployed) -> Problems:
    places = [("ConfigMap:", d.environment(document)) for document in d.pods]
    for place, variables in [*places, ("Dockerfile: ENV", d.image_environment)]:
        for name in sorted(variables):
            if not has_reader(name):
                yield f"{place} {name} is not a setting of app/settings.py; {UNREAD}"


@rule
def a_change_of_the_config_map_is_a_rollout(d: Deployed) -> Problems:
    for document in d.pods:
        for source in d.container(document).get("envFrom", []):
            name = str(at(source, "configMapRef.name"))
            if not re.search(r"-[a-z0-9]{10}$", name):
                yield (
                    f"ConfigMap: {name} has no hash in its name; make it with configMapGenerator, "
                    "or a change does not restart the pods"
                )


@rule
def forwarded_headers_are_trusted_from_proxies_only(d: Deployed) -> Problems:
    if "*" in d.settings.forwarded_allow_ips:
        yield (
            "ConfigMap: FORWARDED_ALLOW_IPS is *; set it to the addresses of the proxies, or any "
            "client can forge its address"
        )


@rule
def environment_is_that_of_the_overlay(d: Deployed) -> Problems:
    expected = ENVIRONMENTS.get(d.overlay, "production")
    if d.settings.environment != expected:
        yield (
            f"ConfigMap: ENVIRONMENT is {d.settings.environment}; "
            f"set it to {expected} in the overlay"
        )


@rule
def pods_have_the_secret_files_that_they_need(d: Deployed) -> Problems:
    for document in d.pods:
        kind = document["kind"]
        needed = NEEDED_BY.get(str(component(document)), NEEDED)
        found = set(d.secrets(document))
        if component(document) == "api":
            found -= OPTIONAL_OF_API
        elif component(document) != "migrate":
            found -= OPTIONAL
        if found != needed:
            yield (
                f"{kind}: {POD}.volumes: the secret files are {sorted(found)}; "
                f"set them to {sorted(needed)}, which the pod needs"
            )
        for volume in d.secret_volumes(document):
            why = "without the secret the pod would start with the default URLs, of localhost"
            source = {"kind": kind, **volume}
            yield from expect(source, "projected.sources.0.secret", why, optional=None)


@rule
def secrets_of_the_overlay_have_every_key(d: Deployed) -> Problems:
    """A pod whose Secret lacks a key does not start (`FailedMount`). An empty value is unset."""
    held = {each["metadata"]["name"]: secret_data(each) for each in d.all("Secret")}
    for document in d.pods:
        for name, key in _required_keys(d, document):
            if name in held and not held[name].get(key):
                yield (
                    f"Secret: {name} has no {key!r}, which the {document['kind']} mounts; add it: "
                    "the pod would not start, or would use the default"
                )


def _required_keys(d: Deployed, document: Document) -> Iterator[tuple[str, str]]:
    """Yield the Secret and the key of each secret file that a pod must have."""
    for volume in d.secret_volumes(document):
        for source in required_sources(volume):
            for item in at(source, "secret.items") or []:
                yield at(source, "secret.name"), item["key"]


@rule
def secrets_are_mounted_read_only_at_secrets_dir(d: Deployed) -> Problems:
    for document in d.pods:
        directory = d.environment(document).get("SECRETS_DIR")
        mounts = _secret_mounts(d, document)
        places = [(mount["mountPath"], mount.get("readOnly")) for mount in mounts]
        if places != [(directory, True)]:
            yield (
                f"{document['kind']}: the secrets are mounted as {mounts}; mount them only at "
                f"SECRETS_DIR={directory}, with readOnly"
            )


def _secret_mounts(d: Deployed, document: Document) -> list[Document]:
    """Return the mounts of the volumes that hold secrets."""
    names = {volume["name"] for volume in d.secret_volumes(document)}
    mounts = d.container(document).get("volumeMounts", [])
    return [mount for mount in mounts if mount["name"] in names]


@rule
def no_variable_is_a_secret(d: Deployed) -> Problems:
    for document in d.pods:
        for name in sorted(d.environment(document)):
            if name.lower() in SECRETS:
                yield (
                    f"{document['kind']}: the variable {name} is a secret; remove it: SECRETS_DIR "
                    "has a file for it"
                )


@rule
def no_secret_is_in_git(d: Deployed) -> Problems:
    for document in d.documents:
        kind = document["kind"]
        if kind == "Secret":
            if d.overlay != "dev":
                yield f"Secret: {d.overlay} has one; remove it from git: docs/runbook.md creates it"
            continue
        for path in find_passwords(document):
            yield f"{kind}: {path} has a password; move it to the Secret"


def find_passwords(document: Document) -> Iterator[str]:
    """Yield the path of each text that has a URL with a password."""
    for path, text in _texts(document):
        if PASSWORD.search(text):
            yield path.removeprefix(".")


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and the value of each text in a document."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _texts(each, f"{path}.{key}")
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _texts(each, f"{path}.{number}")
