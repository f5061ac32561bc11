"""A deployment as the rules read it: a rendered overlay, the image's files, and the settings."""

import base64
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from pydantic import ValidationError

from app.settings import Settings
from tests.deploy import image_file
from tests.deploy.image_file import Stage

PROJECT = Path(__file__).parents[2]
K8S = PROJECT / "deploy/k8s"
OVERLAYS = sorted(file.parent.name for file in K8S.glob("overlays/*/kustomization.yaml"))
COMPONENTS = sorted(file.parent.name for file in K8S.glob("components/*/kustomization.yaml"))
#: The command that migrates.
MIGRATE = ["alembic", "upgrade", "head"]
#: Components that replace the Job, and the user and group of the pods. The order matters.
REPLACING = ["migrate-in-pods", "openshift"]
REPLICA_URL = "database_replica_url"
COMPONENT_LABEL = "app.kubernetes.io/component"
POD = "spec.template.spec"

DECIMAL_UNITS = {letter: 1000**power for power, letter in enumerate("kMGTPE", start=1)}
BINARY_UNITS = {f"{letter}i": 1024**power for power, letter in enumerate("KMGTPE", start=1)}
UNITS: dict[str, float] = {"": 1, "m": 0.001} | DECIMAL_UNITS | BINARY_UNITS
SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "": 1}

#: Variables that the service does not read: its libraries, Python, and the C library do. Manifests,
#: compose.yaml and the Dockerfile may set them. Add those of your platform here.
FOREIGN_VARIABLES = re.compile(
    r"PATH|TZ|LANG|LC_\w+|PYTHON\w+|(LD|MALLOC)_\w+"
    r"|(HTTPS?|ALL|NO)_PROXY|(https?|all|no)_proxy|SSL_CERT_(FILE|DIR)|OTEL_\w+"
    r"|GOOGLE_CLOUD_PROJECT"
)

Document = dict[str, Any]

#: Runs gunicorn.conf.py from stdin and prints the variables that are named in its arguments.
RUN_GUNICORN_CONF = """
import json, sys
variables = {"__file__": sys.argv[1]}
exec(sys.stdin.read(), variables)
values = {name: variables.get(name) for name in sys.argv[2:]}
# The file turns what is printed into log lines.
print(json.dumps(values), file=sys.__stdout__)
"""
GUNICORN_VARIABLES = ("bind", "timeout", "graceful_timeout", "keepalive")

#: Settings by their values: each rule reads them, and they are immutable.
_valid_settings: dict[str, Settings] = {}


class UnreadableError(Exception):
    """A part of the deployment that cannot be checked. The message says how to fix it."""


def at(document: Any, path: str) -> Any:
    """Return the value at a path such as `spec.ports.0.name`, or None."""
    for key in path.split("."):
        if isinstance(document, list):
            document = document[int(key)] if key.isdigit() and int(key) < len(document) else None
        else:
            document = document.get(key) if isinstance(document, dict) else None
    return document


def quantity(value: Any) -> float:
    """Return a quantity of Kubernetes, such as 500m or 256Mi, in cores or bytes.

    Raises `UnreadableError` for other values.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]*)", str(value))
    if not match or match[2] not in UNITS:
        problem = "is missing" if value is None else f"is {value!r}, which is not a quantity"
        msg = f"{problem}; set a number with a unit, such as 500m, 1 or 256Mi"
        raise UnreadableError(msg)
    return float(match[1]) * UNITS[match[2]]


def duration(text: str) -> float:
    """Return the seconds of a duration such as 500ms, 60s, 1m30s or 60.

    Raises `UnreadableError` for other texts.
    """
    parts = re.findall(r"(\d+)(ms|[smhd]|$)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        msg = f"{text!r} is not a duration; set a number with a unit, such as 60s or 1m30s"
        raise UnreadableError(msg)
    return sum(int(number) * SECONDS[unit] for number, unit in parts)


def missing(tool: str) -> NoReturn:
    """Skip the test because a tool is missing. CI runs everything, so there the test fails."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{tool} is missing; CI=true makes that a failure")
    pytest.skip(f"{tool} is missing")


def kustomize() -> list[str]:
    """Return the command that renders a directory. Without one, skip the test, or fail it in CI."""
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    if shutil.which("kubectl"):
        return ["kubectl", "kustomize"]
    missing("kustomize (kubectl contains it, too)")


@functools.cache
def render(directory: Path) -> list[Document]:
    """Return the documents of an overlay, shared by all callers: copy them before a change.

    Raises `UnreadableError` if the overlay does not render.
    """
    command = [*kustomize(), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        msg = f"deploy/k8s/overlays/{directory.name} does not render: {done.stderr.strip()}"
        raise UnreadableError(msg)
    return list(yaml.safe_load_all(done.stdout))


def is_setting(variable: str) -> bool:
    """Return whether app/settings.py reads a variable."""
    return variable.lower() in Settings.model_fields


def has_reader(variable: str) -> bool:
    """Return whether the service or one of its libraries reads a variable."""
    return is_setting(variable) or FOREIGN_VARIABLES.fullmatch(variable) is not None


def validate_settings(source: str, environment: Mapping[str, Any]) -> Settings:
    """Return the settings that an environment sets. Other variables and empty values do not count.

    Raises `UnreadableError` with each invalid value; `source` is where they are set.
    """
    values: dict[str, Any] = {}
    for name, value in environment.items():
        if is_setting(name) and value not in (None, ""):
            values[name.lower()] = value
    key = repr(sorted(values.items()))
    if key not in _valid_settings:
        _valid_settings[key] = _validate(source, values)
    return _valid_settings[key]


def _validate(source: str, values: dict[str, Any]) -> Settings:
    try:
        return Settings(**values)
    except ValidationError as error:
        # A default that depends on an invalid setting is not an error of its own.
        errors = [each for each in error.errors() if each["type"] != "default_factory_not_called"]
        problems = [
            f"{str(each['loc'][0]).upper()}={each['input']}: {each['msg']}" for each in errors
        ]
        msg = f"{source}: {'; '.join(problems)}"
        raise UnreadableError(msg) from None


@functools.cache
def run_gunicorn_conf(text: str, settings: frozenset[tuple[str, str]]) -> Document:
    """Return the values that gunicorn.conf.py computes with these settings.

    It changes the process that runs it, so it runs in its own. Raises `UnreadableError` if it
    fails.
    """
    inherited = {name: value for name, value in os.environ.items() if not is_setting(name)}
    path = str(PROJECT / "gunicorn.conf.py")
    done = subprocess.run(
        [sys.executable, "-c", RUN_GUNICORN_CONF, path, *GUNICORN_VARIABLES],
        input=text,
        env=inherited | dict(settings),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        output = done.stderr.strip()[-500:]
        msg = f"gunicorn.conf.py does not start with the settings of the ConfigMap: {output}"
        raise UnreadableError(msg)
    values: Document = json.loads(done.stdout.splitlines()[-1])
    return values


def component(document: Document) -> str | None:
    """Return the component label: api, migrate, or none for the objects that both need."""
    return (at(document, "metadata.labels") or {}).get(COMPONENT_LABEL)


@dataclass(frozen=True)
class Deployed:
    """One overlay, and the files of the project that it has to agree with."""

    overlay: str
    documents: list[Document]
    dockerfile: str
    gunicorn_conf: str
    dockerignore: str
    #: deploy/compose/nginx.conf
    proxy: str
    compose: str
    #: Files that are added to compose.yaml, by name.
    compose_overrides: dict[str, str]

    def all(self, kind: str) -> list[Document]:
        """Return the documents of a kind."""
        return [document for document in self.documents if document["kind"] == kind]

    def one(self, kind: str) -> Document:
        """Return the document of a kind.

        Of several, the API's or the migration's counts, or the one that has the service's name.
        Raises `UnreadableError` unless exactly one is left.
        """
        found = self.all(kind)
        if len(found) > 1:
            names = {account["metadata"]["name"] for account in self.all("ServiceAccount")}
            ours = [each for each in found if component(each) in {"api", "migrate"}]
            found = ours or [each for each in found if each["metadata"]["name"] in names]
        if len(found) != 1:
            msg = (
                f"{kind}: {len(found)} are rendered; make it one, "
                "see the resources of base/kustomization.yaml"
            )
            raise UnreadableError(msg)
        return found[0]

    @property
    def api(self) -> Document:
        """The container of the API."""
        return self.container(self.one("Deployment"))

    @property
    def pods(self) -> list[Document]:
        """The documents that create pods."""
        return [document for document in self.documents if at(document, POD)]

    @property
    def migrates_in_pods(self) -> bool:
        """Whether each new pod migrates, in place of a Job."""
        return all(
            at(document, f"{POD}.initContainers.0.command") == MIGRATE
            for document in self.all("Deployment")
        )

    @staticmethod
    def container(document: Document) -> Document:
        """Return the first container of a document that creates pods. Raises `UnreadableError`."""
        found: Document | None = at(document, f"{POD}.containers.0")
        if not found:
            msg = f"{document['kind']}: {POD}.containers is empty; add a container"
            raise UnreadableError(msg)
        return found

    @staticmethod
    def containers(document: Document) -> list[str]:
        """Return the path of each container of a document that creates pods."""
        paths = []
        for kind in ("initContainers", "containers"):
            containers = at(document, f"{POD}.{kind}") or []
            paths += [f"{POD}.{kind}.{number}" for number in range(len(containers))]
        return paths

    @functools.cached_property
    def stages(self) -> list[Stage]:
        """The instructions of the Dockerfile, stage by stage."""
        return image_file.parse_stages(self.dockerfile)

    def instruction(self, name: str) -> str:
        """Return the arguments of the last such instruction in the Dockerfile's last stage."""
        return image_file.last_arguments(self.stages[-1], name)

    @property
    def image_environment(self) -> dict[str, str]:
        """The variables that the image sets."""
        return image_file.environment(self.stages[-1])

    def environment(self, document: Document) -> dict[str, str]:
        """Return the variables of a pod: from its ConfigMaps, then its own.

        Raises `UnreadableError` if a ConfigMap is not in the overlay.
        """
        maps = {each["metadata"]["name"]: each.get("data") or {} for each in self.all("ConfigMap")}
        container = self.container(document)
        variables: dict[str, str] = {}
        for source in container.get("envFrom", []):
            name = at(source, "configMapRef.name")
            if name not in maps:
                kind = document["kind"]
                msg = f"{kind}: envFrom has {name!r}; set it to a ConfigMap: {', '.join(maps)}"
                raise UnreadableError(msg)
            variables |= maps[name]
        for entry in container.get("env", []):
            variables[entry["name"]] = entry.get("value", "")
        return variables

    @staticmethod
    def secret_volumes(document: Document) -> list[Document]:
        """Return the volumes of a pod that hold secrets."""
        volumes = at(document, f"{POD}.volumes") or []
        return [volume for volume in volumes if at(volume, "projected.sources.0.secret")]

    def secrets(self, document: Document) -> dict[str, str | None]:
        """Return the required secret files of a pod, with each value that the overlay holds."""
        held = {each["metadata"]["name"]: secret_data(each) for each in self.all("Secret")}
        files: dict[str, str | None] = {}
        for volume in self.secret_volumes(document):
            for source in required_sources(volume):
                data = held.get(at(source, "secret.name"), {})
                for item in at(source, "secret.items") or []:
                    files[item["path"]] = data.get(item["key"])
        return files

    @functools.cached_property
    def settings(self) -> Settings:
        """The settings of the API. Raises `UnreadableError` if they are invalid."""
        return self.settings_of(self.one("Deployment"))

    def settings_of(self, document: Document) -> Settings:
        """Return the settings of a pod. Raises `UnreadableError` if they are invalid."""
        variables = self.image_environment | self.environment(document)
        secrets = self.secrets(document)
        # A secret that the overlay does not hold: that there is a replica changes the settings.
        if secrets.get(REPLICA_URL, "") is None:
            secrets[REPLICA_URL] = "postgresql://standby/app"
        return validate_settings("ConfigMap", variables | secrets)

    @property
    def _variables(self) -> dict[str, str]:
        return self.image_environment | self.environment(self.one("Deployment"))

    @property
    def gunicorn(self) -> Document:
        """The values `bind`, `timeout`, `graceful_timeout` and `keepalive` of gunicorn.conf.py.

        Without SECRETS_DIR, which exists only in the pod. Raises `UnreadableError`.
        """
        settings = set()
        for name, value in self._variables.items():
            if is_setting(name) and name != "SECRETS_DIR":
                settings.add((name, value))
        return run_gunicorn_conf(self.gunicorn_conf, frozenset(settings))


def scaler_of(d: Deployed, deployment: Document) -> Document | None:
    """Return the autoscaler of KEDA that sets the replicas of a Deployment, or None."""
    for scaler in d.all("ScaledObject"):
        if at(scaler, "spec.scaleTargetRef.name") == deployment["metadata"]["name"]:
            return scaler
    return None


def secret_data(secret: Document) -> dict[str, str]:
    """Return the values of a Secret by their keys."""
    encoded = secret.get("data") or {}
    decoded = {key: base64.b64decode(value).decode() for key, value in encoded.items()}
    return decoded | (secret.get("stringData") or {})


def required_sources(volume: Document) -> list[Document]:
    """Return the sources of a projected volume: the first, and the others unless optional.

    The first must not be optional, which is a rule of its own.
    """
    first, *others = volume["projected"]["sources"]
    return [first, *(source for source in others if not at(source, "secret.optional"))]


def with_every_component(overlay: str, copy: Path) -> Path:
    """Write a copy of deploy/k8s with every component in an overlay, and return its directory.

    Those of `REPLACING` are left out: they replace what the rules are about.
    """
    return with_components(overlay, copy, [name for name in COMPONENTS if name not in REPLACING])


def with_components(overlay: str, copy: Path, components: list[str]) -> Path:
    """Write a copy of deploy/k8s with components in an overlay, and return its directory."""
    directory = shutil.copytree(K8S.parent, copy) / "k8s/overlays" / overlay
    file = directory / "kustomization.yaml"
    content = yaml.safe_load(file.read_text())
    content["components"] = [f"../../components/{name}" for name in components]
    file.write_text(yaml.safe_dump(content))
    return directory


def read(overlay: str, directory: Path | None = None) -> Deployed:
    """Read an overlay, from `directory` if it is a copy, with the files that must agree with it.

    Raises `UnreadableError` if it does not render.
    """
    return Deployed(
        overlay=overlay,
        documents=render(directory or K8S / "overlays" / overlay),
        dockerfile=(PROJECT / "Dockerfile").read_text(),
        gunicorn_conf=(PROJECT / "gunicorn.conf.py").read_text(),
        dockerignore=(PROJECT / ".dockerignore").read_text(),
        proxy=(PROJECT / "deploy/compose/nginx.conf").read_text(),
        compose=(PROJECT / "compose.yaml").read_text(),
        compose_overrides={
            path.name: path.read_text() for path in sorted(PROJECT.glob("compose.*.yaml"))
        },
    )
