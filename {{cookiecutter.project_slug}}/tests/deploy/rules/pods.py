"""Rules for objects and pods: API versions, namespace, accounts, users, images."""

import re

from tests.deploy.checking import CONTAINER, Problems, expect, rule, show
from tests.deploy.deployed import POD, Deployed, at

API_VERSIONS = {
    "Namespace": "v1",
    "ServiceAccount": "v1",
    "ConfigMap": "v1",
    "Service": "v1",
    "Deployment": "apps/v1",
    "Job": "batch/v1",
    "HorizontalPodAutoscaler": "autoscaling/v2",
    "PodDisruptionBudget": "policy/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
}
#: Kinds that only some overlays have.
OPTIONAL_API_VERSIONS = {
    "HTTPRoute": "gateway.networking.k8s.io/v1",
    "ServiceMonitor": "monitoring.coreos.com/v1",
    "ScaledObject": "keda.sh/v1alpha1",
    "TriggerAuthentication": "keda.sh/v1alpha1",
}
NO_API_ACCESS = "nothing here uses the Kubernetes API"
RESTRICTED = "Pod Security `restricted` requires it"
#: Of kustomize's images: a tag and a digest in production, a tag for development.
PINNED = r"\S+:(?!latest@)[\w.-]+@sha256:[0-9a-f]{64}"
TAGGED = r"\S+:(?!latest$)[\w.-]+"


@rule
def every_kind_exists(d: Deployed) -> Problems:
    for kind in API_VERSIONS:
        is_replaced = kind == "Job" and d.migrates_in_pods
        if not d.all(kind) and not is_replaced:
            yield f"{kind}: is missing; add its file to the resources of base/kustomization.yaml"


@rule
def api_versions_are_current(d: Deployed) -> Problems:
    why = "Kubernetes 1.31 and newer serve it"
    for kind, version in (API_VERSIONS | OPTIONAL_API_VERSIONS).items():
        for document in d.all(kind):
            yield from expect(document, "", why, apiVersion=version)


@rule
def everything_is_in_one_restricted_namespace(d: Deployed) -> Problems:
    namespace = d.one("Namespace")
    name = namespace["metadata"]["name"]
    if name == "default":
        yield (
            "Namespace: metadata.name is 'default'; set `namespace` in the overlay's "
            "kustomization.yaml"
        )
    labels = at(namespace, "metadata.labels") or {}
    for mode in ("enforce", "audit", "warn"):
        label = f"pod-security.kubernetes.io/{mode}"
        if labels.get(label) != "restricted":
            found = show(labels.get(label))
            yield f"Namespace: the label {label} is {found}; set it to 'restricted'"
    for document in d.documents:
        if document is not namespace:
            why = "it is the namespace of the overlay"
            yield from expect(document, "metadata", why, namespace=name)


@rule
def pods_have_a_service_account_without_a_token(d: Deployed) -> Problems:
    account = d.one("ServiceAccount")
    yield from expect(account, "", NO_API_ACCESS, automountServiceAccountToken=False)
    for document in d.pods:
        yield from expect(
            document,
            POD,
            NO_API_ACCESS,
            serviceAccountName=account["metadata"]["name"],
            automountServiceAccountToken=False,
        )
        why = "nothing here needs the addresses of all Services"
        yield from expect(document, POD, why, enableServiceLinks=False)


@rule
def image_has_a_numeric_user(d: Deployed) -> Problems:
    if _user_of_the_image(d) is None:
        yield (
            f"Dockerfile: USER is {d.instruction('USER')!r}; set one number for user and group, "
            "such as 10001:10001"
        )


@rule
def pods_run_as_the_user_of_the_image(d: Deployed) -> Problems:
    user = _user_of_the_image(d)
    if user is None:
        return
    why = "it is the USER of the Dockerfile"
    # OpenShift assigns users, and rejects pods that ask for one.
    is_assigned = "runAsUser" not in str(d.pods)
    number = None if is_assigned else user
    identity = {"runAsNonRoot": True, "runAsUser": number, "runAsGroup": number}
    for document in d.pods:
        yield from expect(document, f"{POD}.securityContext", why, **identity, fsGroup=number)
        for place in d.containers(document):
            yield from expect(document, f"{place}.securityContext", why, **identity)


def _user_of_the_image(d: Deployed) -> int | None:
    """Return the number of the user and group in the Dockerfile, or None if it is not one."""
    user, _, group = d.instruction("USER").partition(":")
    return int(user) if user.isdigit() and user == group != "0" else None


@rule
def pods_do_not_use_the_node(d: Deployed) -> Problems:
    for document in d.pods:
        kind = document["kind"]
        own = {"hostNetwork": None, "hostPID": None, "hostIPC": None}
        yield from expect(document, POD, RESTRICTED, **own)
        for volume in at(document, f"{POD}.volumes") or []:
            if "hostPath" in volume:
                name = volume["name"]
                yield f"{kind}: {POD}.volumes: {name} is a hostPath; remove it: {RESTRICTED}"
        for place in d.containers(document):
            if any("hostPort" in port for port in at(document, f"{place}.ports") or []):
                yield f"{kind}: {place}.ports has a hostPort; remove it: {RESTRICTED}"


@rule
def containers_have_no_privileges(d: Deployed) -> Problems:
    for document in d.pods:
        context = f"{POD}.securityContext"
        yield from expect(document, context, RESTRICTED, seccompProfile__type="RuntimeDefault")
        for place in d.containers(document):
            yield from expect(
                document,
                f"{place}.securityContext",
                RESTRICTED,
                privileged=False,
                allowPrivilegeEscalation=False,
                readOnlyRootFilesystem=True,
                capabilities={"drop": ["ALL"]},
            )


@rule
def images_are_pinned_and_the_same_in_all_pods(d: Deployed) -> Problems:
    pattern = TAGGED if d.overlay == "dev" else PINNED
    pull_policy = "IfNotPresent" if d.overlay == "dev" else "Always"
    api_image = d.api.get("image")
    for document in d.pods:
        image = d.container(document).get("image")
        prefix = f"{document['kind']}: image is {show(image)}"
        if not re.fullmatch(pattern, _without_jinja(str(image))):
            yield f"{prefix}; pin it in the overlay: `kustomize edit set image`"
        if image != api_image:
            yield f"{prefix}; set it to the image of the API, {show(api_image)}"
        why = "otherwise the node may run another image of this name"
        yield from expect(document, CONTAINER, why, imagePullPolicy=pull_policy)


def _without_jinja(image: str) -> str:
    """Return an image with a name in place of Jinja: the template is checked as it is."""
    return re.sub(r"\{+ [\w.]+ \}+", "service", image)
