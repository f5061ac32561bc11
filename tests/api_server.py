"""A fake API server of Kubernetes: it stores objects, and reports success at once.

It enforces the one rule that shapes a rollout: a Job is immutable. Of the controllers it has one
result: a ReplicaSet for each template of a Deployment, which an undo needs.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Document = dict[str, Any]
#: The resources of each API version, by kind.
KINDS = {
    "v1": {
        "Namespace": "namespaces",
        "ServiceAccount": "serviceaccounts",
        "ConfigMap": "configmaps",
        "Secret": "secrets",
        "Service": "services",
        "Pod": "pods",
    },
    "apps/v1": {"Deployment": "deployments", "ReplicaSet": "replicasets"},
    "batch/v1": {"Job": "jobs"},
    "autoscaling/v2": {"HorizontalPodAutoscaler": "horizontalpodautoscalers"},
    "policy/v1": {"PodDisruptionBudget": "poddisruptionbudgets"},
    "networking.k8s.io/v1": {"NetworkPolicy": "networkpolicies"},
}
SHORT_NAMES = {"horizontalpodautoscalers": ["hpa"], "poddisruptionbudgets": ["pdb"]}
REVISION = "deployment.kubernetes.io/revision"
VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]


def merge(document: Document, patch: Document) -> None:
    """Merge a patch into a document. Lists are replaced, not merged."""
    for key, value in patch.items():
        if isinstance(value, dict) and isinstance(document.get(key), dict):
            merge(document[key], value)
        else:
            document[key] = value


def replace(document: Document, operations: list[Document]) -> None:
    """Apply the operations of a JSON patch (RFC 6902), each of which sets a field."""
    for operation in operations:
        *parents, key = operation["path"].strip("/").split("/")
        target = document
        for parent in parents:
            target = target[parent]
        target[key] = operation["value"]


def matches(document: Document, selector: str) -> bool:
    """Return whether an object has the labels of a selector, such as `a=b,c!=d`."""
    labels = document["metadata"].get("labels", {})
    for term in filter(None, selector.split(",")):
        name, operator, value = term.rpartition("!=" if "!=" in term else "=")
        if (labels.get(name) == value) != (operator == "="):
            return False
    return True


def describe_resource(kind: str, name: str) -> Document:
    """Return the discovery document of a resource."""
    return {
        "name": name,
        "kind": kind,
        "namespaced": kind != "Namespace",
        "verbs": VERBS,
        "singularName": "",
        "shortNames": SHORT_NAMES.get(name, []),
    }


def list_groups() -> Document:
    """Return the discovery document of all API groups."""
    groups = []
    for version in KINDS:
        group, slash, number = version.partition("/")
        if slash:
            preferred = {"groupVersion": version, "version": number}
            groups.append({"name": group, "versions": [preferred], "preferredVersion": preferred})
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


def list_resources(version: str) -> Document:
    """Return the discovery document of an API version."""
    resources = [describe_resource(kind, name) for kind, name in KINDS[version].items()]
    return {"kind": "APIResourceList", "groupVersion": version, "resources": resources}


def find_kind(resource: str) -> tuple[str, str] | None:
    """Return the API version and the kind of a resource, or None."""
    for version, kinds in KINDS.items():
        for kind, name in kinds.items():
            if name == resource:
                return version, kind
    return None


class ApiServer(ThreadingHTTPServer):
    """Listens on the loopback interface.

    `changes` are the modifying requests so far, such as `POST jobs/service-migrate`.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, Document] = {}
        self.changes: list[str] = []
        self.migrations_fail = False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def set_status(self, document: Document) -> None:
        """Give an object the status that controllers would reach after a while."""
        uid = f"{document['kind']}/{document['metadata']['name']}"
        document["metadata"].update({"uid": uid, "resourceVersion": "1", "generation": 1})
        if document["kind"] == "Job":
            document["status"] = {"conditions": self._job_conditions()}
        if document["kind"] == "Deployment":
            document["spec"]["replicas"] = 3
            counts = ("replicas", "updatedReplicas", "readyReplicas", "availableReplicas")
            document["status"] = {"observedGeneration": 1, **dict.fromkeys(counts, 3)}

    def save_revision(self, document: Document) -> None:
        """Keep the template of a Deployment in a ReplicaSet, as its newest revision."""
        if document["kind"] != "Deployment":
            return
        metadata = document["metadata"]
        template = document["spec"]["template"]
        digest = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()
        name = f"{metadata['name']}-{digest[:10]}"
        owner = {"apiVersion": "apps/v1", "kind": "Deployment", "name": metadata["name"]}
        revision = str(1 + len(self.changes))
        self.objects[f"/apis/apps/v1/namespaces/{metadata['namespace']}/replicasets/{name}"] = {
            "apiVersion": "apps/v1",
            "kind": "ReplicaSet",
            "metadata": {
                "name": name,
                "uid": name,
                "namespace": metadata["namespace"],
                "labels": template["metadata"]["labels"],
                "annotations": {REVISION: revision},
                "ownerReferences": [{**owner, "uid": metadata["uid"], "controller": True}],
            },
            "spec": {
                "replicas": 0,
                "selector": document["spec"]["selector"],
                "template": json.loads(json.dumps(template)),
            },
        }

    def _job_conditions(self) -> list[Document]:
        """Return the conditions of a Job that has ended."""
        types = ["SuccessCriteriaMet", "Complete"]
        if self.migrations_fail:
            types = ["FailureTarget", "Failed"]
        return [{"type": each, "status": "True"} for each in types]


class Handler(BaseHTTPRequestHandler):
    """One request of kubectl."""

    server: ApiServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def respond(self, document: Document, code: int = 200) -> None:
        """Send a document."""
        content = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def reject(self, code: int, reason: str, message: str) -> None:
        """Send an error."""
        status = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "reason": reason,
            "message": message,
            "code": code,
        }
        self.respond(status, code)

    @property
    def place(self) -> str:
        """The path without its query."""
        return self.path.partition("?")[0]

    def read_body(self) -> Document:
        """Return the document of the request; an empty body is an empty document."""
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        document: Document = json.loads(content or b"{}")
        return document

    def record(self, path: str) -> None:
        """Record a change."""
        self.server.changes.append(f"{self.command} {'/'.join(path.split('/')[-2:])}")

    def do_GET(self) -> None:
        """Respond to discovery, with an object, or with a list; a watch reports no change."""
        version = self.place.removeprefix("/apis/").removeprefix("/api/")
        if self.place == "/api":
            self.respond({"kind": "APIVersions", "versions": ["v1"]})
        elif self.place == "/apis":
            self.respond(list_groups())
        elif version in KINDS:
            self.respond(list_resources(version))
        elif self.place in self.server.objects:
            self.respond(self.server.objects[self.place])
        elif "watch=" in self.path:
            self.respond({})
        else:
            self._respond_list()

    def _respond_list(self) -> None:
        """Send the objects of a resource."""
        parent, _, resource = self.place.rpartition("/")
        found = find_kind(resource)
        if found is None:
            self.reject(404, "NotFound", f"{parent.rpartition('/')[2]} {resource!r} not found")
            return
        version, kind = found
        query = parse_qs(urlsplit(self.path).query)
        (selector,) = query.get("labelSelector", [""])
        (field,) = query.get("fieldSelector", [""])
        name = field.removeprefix("metadata.name=")
        items = [
            document
            for path, document in self.server.objects.items()
            if path.rpartition("/")[0] == self.place
            and matches(document, selector)
            and name in ("", document["metadata"]["name"])
        ]
        self.respond({"kind": f"{kind}List", "apiVersion": version, "metadata": {}, "items": items})

    def do_POST(self) -> None:
        """Store an object."""
        document = self.read_body()
        path = f"{self.place}/{document['metadata']['name']}"
        self.record(path)
        self.server.set_status(document)
        self.server.objects[path] = document
        self.server.save_revision(document)
        self.respond(document, 201)

    def do_PUT(self) -> None:
        """Replace an object."""
        self.record(self.place)
        self.server.objects[self.place] = self.read_body()
        self.respond(self.server.objects[self.place])

    def do_PATCH(self) -> None:
        """Change an object, unless it is a Job."""
        patch: Any = self.read_body()
        if "/jobs/" in self.place and "template" in patch.get("spec", {}):
            self.reject(422, "Invalid", "spec.template: field is immutable")
            return
        self.record(self.place)
        document = self.server.objects[self.place]
        if isinstance(patch, list):
            replace(document, patch)
        else:
            merge(document, patch)
        self.server.save_revision(document)
        self.respond(document)

    def do_DELETE(self) -> None:
        """Delete an object."""
        self.read_body()
        if self.server.objects.pop(self.place, None) is None:
            self.reject(404, "NotFound", "not found")
            return
        self.record(self.place)
        self.respond({"kind": "Status", "apiVersion": "v1", "status": "Success"})
