"""What is deployed: an overlay as kustomize renders it, the Dockerfile, gunicorn.conf.py, and the settings in there."""

import base64
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from app.settings import Settings

PROJECT = Path(__file__).parents[2]
K8S = PROJECT / "deploy/k8s"
OVERLAYS = sorted(file.parent.name for file in K8S.glob("overlays/*/kustomization.yaml"))
COMPONENTS = sorted(file.parent.name for file in K8S.glob("components/*/kustomization.yaml"))
Document = dict[str, Any]
UNITS = {"": 1, "m": 1e-3} | {
    letter + binary: base**power
    for binary, base in (("", 1000), ("i", 1024))
    for power, letter in enumerate("kMGTPE" if base == 1000 else "KMGTPE", 1)
}


class UnreadableError(Exception):
    """What is deployed cannot be judged; the message says what to mend."""


def at(document: Any, path: str) -> Any:
    """Return what stands at a path such as `spec.ports.0.name`, or None."""
    for key in path.split("."):
        if isinstance(document, list):
            document = document[int(key)] if key.isdigit() and int(key) < len(document) else None
        else:
            document = document.get(key) if isinstance(document, dict) else None
    return document


def quantity(value: Any) -> float:
    """Return a quantity of Kubernetes, such as 500m or 256Mi, in cores or bytes. Raises `UnreadableError`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]*)", str(value))
    if not found or found[2] not in UNITS:
        msg = f"{value!r} is no quantity: it takes a number with a unit, such as 500m, 1, or 256Mi"
        raise UnreadableError(msg)
    return float(found[1]) * float(UNITS[found[2]])


def duration(text: str) -> float:
    """Return the seconds of a time such as 500ms, 60s, 1m30s, or 60. Raises `UnreadableError`."""
    parts = re.findall(r"(\d+)(ms|[smhd]|$)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        msg = f"{text!r} is no time: it takes a number with a unit, such as 60s or 1m30s"
        raise UnreadableError(msg)
    return sum(
        int(number) * {"ms": 0.001, "m": 60, "h": 3600, "d": 86400}.get(unit, 1)
        for number, unit in parts
    )


def kustomize() -> list[str] | None:
    """Return the command that renders a folder, or None if neither kustomize nor kubectl is on PATH."""
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    return ["kubectl", "kustomize"] if shutil.which("kubectl") else None


@functools.cache
def render(folder: Path) -> list[Document]:
    """Return the documents of an overlay; whoever changes them takes a copy. Raises `UnreadableError`."""
    done = subprocess.run(
        [*(kustomize() or []), str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        msg = f"deploy/k8s/overlays/{folder.name} does not render: {done.stderr.strip()}"
        raise UnreadableError(msg)
    return list(yaml.safe_load_all(done.stdout))


@functools.cache
def _gunicorn(text: str, environment: frozenset[tuple[str, str]]) -> Document:
    """Return what gunicorn.conf.py decides in this environment. It changes its process, so it gets one of its own."""
    program = (
        "import json, sys; conf = {'__file__': sys.argv[1]}; exec(sys.stdin.read(), conf); "
        "print(json.dumps({name: conf.get(name) for name in sys.argv[2:]}))"
    )
    names = ("bind", "timeout", "graceful_timeout", "keepalive")
    done = subprocess.run(
        [sys.executable, "-c", program, str(PROJECT / "gunicorn.conf.py"), *names],
        input=text,
        env={
            name: value
            for name, value in os.environ.items()
            if name.lower() not in Settings.model_fields
        }
        | dict(environment),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        msg = f"gunicorn.conf.py does not start with the ConfigMap's settings: {done.stderr.strip()[-500:]}"
        raise UnreadableError(msg)
    decided: Document = json.loads(done.stdout.splitlines()[-1])
    return decided


@dataclass(frozen=True)
class Deployed:
    """One overlay, and the files of the project that it has to agree with."""

    overlay: str
    documents: list[Document]
    dockerfile: str
    gunicorn_conf: str
    dockerignore: str
    proxy: str  # deploy/compose/nginx.conf
    compose: str

    def all(self, kind: str) -> list[Document]:
        """Return the documents of a kind."""
        return [document for document in self.documents if document["kind"] == kind]

    def one(self, kind: str) -> Document:
        """Return the document of a kind; of several the API's, the migration's, or that of all."""
        if len(found := self.all(kind)) > 1:
            accounts = [document["metadata"]["name"] for document in self.all("ServiceAccount")]
            ours = [document for document in found if component(document) in {"api", "migrate"}]
            found = ours or [
                document for document in found if document["metadata"]["name"] in accounts
            ]
        if len(found) != 1:
            msg = f"{kind}: {len(found)} are rendered, not one: look at the resources of base/kustomization.yaml"
            raise UnreadableError(msg)
        return found[0]

    @property
    def api(self) -> Document:
        """The container of the API."""
        return self.container(self.one("Deployment"))

    @property
    def pods(self) -> list[Document]:
        """Whatever makes pods."""
        return [document for document in self.documents if at(document, "spec.template.spec")]

    @staticmethod
    def container(document: Document) -> Document:
        """Return the one container of what makes pods. Raises `UnreadableError`."""
        if not (found := at(document, "spec.template.spec.containers.0")):
            msg = f"{document['kind']}: spec.template.spec.containers is empty: it takes one container"
            raise UnreadableError(msg)
        return found  # type: ignore[no-any-return]

    @staticmethod
    def containers(document: Document) -> list[str]:
        """Return the path of each container of what makes pods."""
        return [
            f"spec.template.spec.{kind}.{number}"
            for kind in ("initContainers", "containers")
            for number in range(len(at(document, f"spec.template.spec.{kind}") or []))
        ]

    @functools.cached_property
    def stages(self) -> list[list[tuple[str, str]]]:
        """The instructions of the Dockerfile, stage by stage, as pairs of name and rest."""
        text = re.sub(r"^\s*#.*\n", "", self.dockerfile, flags=re.MULTILINE).replace("\\\n", " ")
        stages: list[list[tuple[str, str]]] = [[]]
        for name, rest in re.findall(r"^\s*([A-Za-z]+)\s+(.*)$", text, re.MULTILINE):
            if name.upper() == "FROM":
                stages.append([])
            stages[-1].append((name.upper(), " ".join(rest.split())))
        return stages

    def instruction(self, name: str) -> str:
        """Return the last of the instructions with this name in the last stage of the Dockerfile, or nothing."""
        return next((rest for found, rest in reversed(self.stages[-1]) if found == name), "")

    @property
    def image_environment(self) -> dict[str, str]:
        """What the image itself sets."""
        words = [
            word for name, rest in self.stages[-1] if name == "ENV" for word in shlex.split(rest)
        ]
        return dict(word.split("=", 1) for word in words if "=" in word)

    def environment(self, document: Document) -> dict[str, str]:
        """Return what a pod sets: its ConfigMaps, then its own literals. Raises `UnreadableError`."""
        found: dict[str, str] = {}
        maps = {
            config["metadata"]["name"]: config.get("data") or {} for config in self.all("ConfigMap")
        }
        for source in self.container(document).get("envFrom", []):
            name = at(source, "configMapRef.name")
            if name not in maps:
                msg = f"{document['kind']}: envFrom names {name!r}; set it to a ConfigMap that is here: {', '.join(maps)}"
                raise UnreadableError(msg)
            found |= maps[name]
        return found | {
            entry["name"]: entry.get("value", "")
            for entry in self.container(document).get("env", [])
        }

    @staticmethod
    def secret_volumes(document: Document) -> list[Document]:
        """Return the volumes of a pod that hold secrets."""
        volumes = at(document, "spec.template.spec.volumes") or []
        return [volume for volume in volumes if at(volume, "projected.sources.0.secret")]

    def secrets(self, document: Document) -> dict[str, str | None]:
        """Return the secret files that a pod needs by name, each with its value where the overlay holds it."""
        held = {
            secret["metadata"]["name"]: secret.get("data") or {} for secret in self.all("Secret")
        }
        found = {}
        for volume in self.secret_volumes(document):
            for source in volume["projected"]["sources"]:
                needed = source is volume["projected"]["sources"][0] or not at(
                    source, "secret.optional"
                )
                for item in (at(source, "secret.items") or []) if needed else []:
                    value = held.get(source["secret"]["name"], {}).get(item["key"])
                    found[item["path"]] = base64.b64decode(value).decode() if value else None
        return found

    @functools.cached_property
    def settings(self) -> Settings:
        """The settings that the API runs with. Raises `UnreadableError` with what is wrong."""
        files = {
            name: value for name, value in self.secrets(self.one("Deployment")).items() if value
        }
        known = {
            name: value
            for name, value in (self._env | files).items()
            if name.lower() in Settings.model_fields
        }
        try:
            return Settings(**{name.lower(): value for name, value in known.items() if value})  # type: ignore[arg-type]
        except ValidationError as error:
            faults = (
                f"{str(fault['loc'][0]).upper()}={fault['input']}: {fault['msg']}"
                for fault in error.errors()
            )
            msg = f"ConfigMap: {'; '.join(faults)}"
            raise UnreadableError(msg) from None

    @property
    def _env(self) -> dict[str, str]:
        return self.image_environment | self.environment(self.one("Deployment"))

    @property
    def gunicorn(self) -> Document:
        """What gunicorn.conf.py decides with the settings of the API, on its keys `bind`, `timeout` and others."""
        names = {name.upper() for name in Settings.model_fields} - {
            "SECRETS_DIR"
        }  # a folder that is only in the pod
        return _gunicorn(
            self.gunicorn_conf, frozenset((k, v) for k, v in self._env.items() if k in names)
        )


def component(document: Document) -> str | None:
    """Return the label that tells the API's objects from the migration's and from those of both."""
    return (at(document, "metadata.labels") or {}).get("app.kubernetes.io/component")


def with_every_component(overlay: str, copy: Path) -> Path:
    """Write a copy of deploy/k8s, with every component in an overlay, and return the folder of that."""
    file = shutil.copytree(K8S, copy) / "overlays" / overlay / "kustomization.yaml"
    wanted = {"components": [f"../../components/{name}" for name in COMPONENTS]}
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | wanted))
    return file.parent


def read(overlay: str, folder: Path | None = None) -> Deployed:
    """Return an overlay with the files beside it; `folder` is where another one stands. Raises `UnreadableError`."""
    files = (
        "Dockerfile",
        "gunicorn.conf.py",
        ".dockerignore",
        "deploy/compose/nginx.conf",
        "compose.yaml",
    )
    return Deployed(
        overlay,
        render(folder or K8S / "overlays" / overlay),
        *((PROJECT / name).read_text() for name in files),
    )
