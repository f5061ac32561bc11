"""A stand-in for the API server of Kubernetes: it keeps what kubectl sends, and says at once that all went as wished.

It knows the one rule that shapes a rollout, that a Job cannot be changed, and nothing else: no controller runs.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Document = dict[str, Any]
KINDS = {
    "v1": {
        "Namespace": "namespaces",
        "ServiceAccount": "serviceaccounts",
        "ConfigMap": "configmaps",
    }
    | {"Secret": "secrets", "Service": "services", "Pod": "pods"},
    "apps/v1": {"Deployment": "deployments"},
    "batch/v1": {"Job": "jobs"},
    "autoscaling/v2": {"HorizontalPodAutoscaler": "horizontalpodautoscalers"},
    "policy/v1": {"PodDisruptionBudget": "poddisruptionbudgets"},
    "networking.k8s.io/v1": {"NetworkPolicy": "networkpolicies"},
}
SHORT = {"horizontalpodautoscalers": ["hpa"], "poddisruptionbudgets": ["pdb"]}
VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]


def merge(document: Document, patch: Document) -> None:
    """Merge a patch into a document, as far as objects go."""
    for key, value in patch.items():
        if isinstance(value, dict) and isinstance(document.get(key), dict):
            merge(document[key], value)
        else:
            document[key] = value


class ApiServer(ThreadingHTTPServer):
    """Listens on the loopback interface; `done` is what it was told, such as `POST jobs/service-migrate`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, Document] = {}
        self.done: list[str] = []
        self.migrations_fail = False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def settle(self, document: Document) -> None:
        """Say of an object what controllers would have said after a while."""
        document["metadata"].update({"uid": "1", "resourceVersion": "1", "generation": 1})
        if document["kind"] == "Job":
            ends = (
                ("FailureTarget", "Failed")
                if self.migrations_fail
                else ("SuccessCriteriaMet", "Complete")
            )
            document["status"] = {"conditions": [{"type": end, "status": "True"} for end in ends]}
        if document["kind"] == "Deployment":
            document["spec"]["replicas"] = 3
            counts = ("replicas", "updatedReplicas", "readyReplicas", "availableReplicas")
            document["status"] = {"observedGeneration": 1, **dict.fromkeys(counts, 3)}


class Handler(BaseHTTPRequestHandler):
    """One request of kubectl."""

    server: ApiServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Stay silent."""

    def answer(self, document: Document, code: int = 200) -> None:
        """Send a document."""
        content = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def refuse(self, code: int, reason: str, message: str) -> None:
        """Send an error."""
        status = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "reason": reason,
            "message": message,
        }
        self.answer({**status, "code": code}, code)

    @property
    def where(self) -> str:
        """The path without its query."""
        return self.path.partition("?")[0]

    def body(self) -> Document:
        """Read what was sent."""
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        document: Document = json.loads(content or b"{}")
        return document

    def note(self, path: str) -> None:
        """Remember a change."""
        self.server.done.append(f"{self.command} {'/'.join(path.split('/')[-2:])}")

    def do_GET(self) -> None:
        """Answer discovery, an object, or a list; a watch tells of no change."""
        resources = {
            version: [
                {
                    "name": name,
                    "kind": kind,
                    "namespaced": kind != "Namespace",
                    "verbs": VERBS,
                    "singularName": "",
                }
                | {"shortNames": SHORT.get(name, [])}
                for kind, name in kinds.items()
            ]
            for version, kinds in KINDS.items()
        }
        listed = {
            name: (version, kind)
            for version, kinds in KINDS.items()
            for kind, name in kinds.items()
        }
        versions = [
            {"groupVersion": version, "version": version.split("/")[-1]}
            for version in KINDS
            if "/" in version
        ]
        folder, _, last = self.where.rpartition("/")
        if self.where == "/api":
            self.answer({"kind": "APIVersions", "versions": ["v1"]})
        elif self.where == "/apis":
            groups = [
                {
                    "name": one["groupVersion"].split("/")[0],
                    "versions": [one],
                    "preferredVersion": one,
                }
                for one in versions
            ]
            self.answer({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
        elif (version := self.where.removeprefix("/apis/").removeprefix("/api/")) in resources:
            self.answer(
                {
                    "kind": "APIResourceList",
                    "groupVersion": version,
                    "resources": resources[version],
                }
            )
        elif self.where in self.server.objects:
            self.answer(self.server.objects[self.where])
        elif "watch=" in self.path:
            self.answer({})
        elif last in listed:
            version, kind = listed[last]
            found = [
                value
                for path, value in self.server.objects.items()
                if path.rpartition("/")[0] == self.where
            ]
            self.answer(
                {"kind": f"{kind}List", "apiVersion": version, "metadata": {}, "items": found}
            )
        else:
            self.refuse(404, "NotFound", f"{folder.rpartition('/')[2]} {last!r} not found")

    def do_POST(self) -> None:
        """Keep an object."""
        document = self.body()
        path = f"{self.where}/{document['metadata']['name']}"
        self.note(path)
        self.server.settle(document)
        self.server.objects[path] = document
        self.answer(document, 201)

    def do_PUT(self) -> None:
        """Replace an object."""
        self.note(self.where)
        self.server.objects[self.where] = self.body()
        self.answer(self.server.objects[self.where])

    def do_PATCH(self) -> None:
        """Change an object, unless it is a Job."""
        patch = self.body()
        if "/jobs/" in self.where and "template" in patch.get("spec", {}):
            self.refuse(422, "Invalid", "spec.template: field is immutable")
            return
        self.note(self.where)
        merge(self.server.objects[self.where], patch)
        self.answer(self.server.objects[self.where])

    def do_DELETE(self) -> None:
        """Forget an object."""
        self.body()
        if self.server.objects.pop(self.where, None) is None:
            self.refuse(404, "NotFound", "not found")
            return
        self.note(self.where)
        self.answer({"kind": "Status", "apiVersion": "v1", "status": "Success"})
