"""Rules for settings and secrets: every variable is a setting, every secret is a file."""

import re
from collections.abc import Iterator
from typing import Any

from pydantic import SecretStr

from app.settings import Settings
from tests.deploy.checking import Problems, expect, rule
from tests.deploy.deployed import POD, Deployed, Document, at, component

SECRETS = {
    name for name, field in Settings.model_fields.items() if isinstance(field.default, SecretStr)
}
MIGRATION_SECRETS = {"database_url"}
SETTINGS = {name.upper() for name in Settings.model_fields}
#: Variables of the image that Python and the C library read.
RUNTIME_VARIABLES = r"PATH|PYTHON\w+|(LD|MALLOC)_\w+"
#: A URL with a password.
PASSWORD = re.compile(r"://[^/\s:@]*:[^/@\s]+@")
#: ENVIRONMENT of an overlay. All others are production.
ENVIRONMENTS = {"dev": "development", "staging": "staging"}


@rule
def every_variable_is_a_setting(d: Deployed) -> Problems:
    remedy = "correct its name, or remove it: it has no effect"
    for document in d.pods:
        for name in sorted(d.environment(document).keys() - SETTINGS):
            yield f"ConfigMap: {name} is not a setting of app/settings.py; {remedy}"
    for name in sorted(d.image_environment.keys() - SETTINGS):
        if not re.fullmatch(RUNTIME_VARIABLES, name):
            yield f"Dockerfile: ENV {name} is not a setting of app/settings.py; {remedy}"


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
        needed = MIGRATION_SECRETS if component(document) == "migrate" else SECRETS
        found = set(d.secrets(document))
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
