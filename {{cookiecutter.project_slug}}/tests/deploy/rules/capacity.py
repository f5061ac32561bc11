"""Rules for capacity: CPU, memory, connections to Postgres, and the autoscaler."""

from app.sizing.checks import check_settings
from app.sizing.plan import BASE_MEMORY_MB, MIN_CONNECTIONS, plan_workers, pod_connections
from tests.deploy.checking import (
    CONTAINER,
    MEGABYTE,
    Problems,
    api_resources,
    expect,
    expect_between,
    pod_count,
    quantity_at,
    rule,
)
from tests.deploy.deployed import POD, Deployed, Document, UnreadableError, at, component, scaler_of

#: Connections that do not depend on the number of pods.
MIGRATION_CONNECTIONS = 1
RESERVED_CONNECTIONS = 3  # superuser_reserved_connections of Postgres
#: Those of a query of KEDA: its polls, and the requests of the autoscaler that it has created.
KEDA_CONNECTIONS = 2
#: The default of KEDA for `maxReplicaCount`.
KEDA_MAX_REPLICAS = 100
#: Bounds for the autoscaler's target, as a share of the CPU limit. Above, new pods are ready too
#: late; below, the pods idle.
MAX_CPU_TARGET = 0.8
MIN_CPU_TARGET = 0.5
#: Directories that are written to. Only the API has shared memory.
TEMPORARY_DIRECTORY = "/tmp"
SHARED_MEMORY = "/dev/shm"


@rule
def settings_agree_with_each_other_and_the_limits(d: Deployed) -> Problems:
    """The rules of `make doctor`. Connections are counted below, where the surge is known."""
    document = d.one("Deployment")
    mount = _mounts(d, document).get(SHARED_MEMORY)
    shared_memory = _memory_limit(document, mount) if mount else None
    shared_memory_bytes = None if shared_memory is None else int(shared_memory * MEGABYTE)
    resources = api_resources(d)._replace(shared_memory_bytes=shared_memory_bytes)
    workers = plan_workers(d.settings, resources).workers
    for problem in check_settings(d.settings, resources, workers, replicas=0):
        yield f"ConfigMap: {problem}"


@rule
def api_has_at_least_one_cpu(d: Deployed) -> Problems:
    cpus = api_resources(d).cpus
    if cpus < 1:
        yield (
            f"Deployment: resources.limits.cpu is {cpus:g}; set it to 1 or more: below that the "
            "kernel throttles the event loop"
        )


@rule
def postgres_accepts_the_connections_of_a_rollout(d: Deployed) -> Problems:
    """During a rollout the pods of two releases run, and the surge of the API."""
    allowed = d.settings.postgres_max_connections
    replicas = max_pods(d, d.one("Deployment"))
    total = MIGRATION_CONNECTIONS + RESERVED_CONNECTIONS
    terms = [f"{MIGRATION_CONNECTIONS} (migration)", f"{RESERVED_CONNECTIONS} (reserved)"]
    for document in d.all("Deployment"):
        pods = pods_of_a_rollout(document, max_pods(d, document))
        if component(document) == "api":
            pods += pod_count(at(document, "spec.strategy.rollingUpdate.maxSurge"), replicas)
        per_pod = _connections(d, document)
        total += pods * per_pod
        terms.append(f"{pods} {component(document)} pods x DATABASE_MAX_CONNECTIONS={per_pod}")
    if d.all("ScaledObject"):
        total += KEDA_CONNECTIONS
        terms.append(f"{KEDA_CONNECTIONS} (KEDA)")
    if total > allowed:
        yield (
            f"HorizontalPodAutoscaler: maxReplicas is {replicas}; during a rollout, with maxSurge, "
            f"{' + '.join(terms)} = {total} connections exceed POSTGRES_MAX_CONNECTIONS={allowed}: "
            "lower maxReplicas or DATABASE_MAX_CONNECTIONS, raise max_connections of the server, "
            "or add the component egress-pgbouncer"
        )


def max_pods(d: Deployed, document: Document) -> int:
    """Return the replicas of a Deployment, or the maximum of its autoscaler."""
    scaler = scaler_of(d, document)
    if component(document) == "api":
        return at(d.one("HorizontalPodAutoscaler"), "spec.maxReplicas") or 0
    if scaler:
        return at(scaler, "spec.maxReplicaCount") or KEDA_MAX_REPLICAS
    return at(document, "spec.replicas") or 1


def pods_of_a_rollout(document: Document, replicas: int) -> int:
    """Return the number of pods that can have connections at once during a rollout.

    All of two releases, since the old ones end slowly. Fewer if a new pod counts as available only
    after the grace period: the pods that were stopped before it are gone by then.
    """
    grace = at(document, f"{POD}.terminationGracePeriodSeconds") or 0
    if (at(document, "spec.minReadySeconds") or 0) < grace:
        return 2 * replicas
    rolling = at(document, "spec.strategy.rollingUpdate") or {}
    surge = pod_count(rolling.get("maxSurge"), replicas)
    unavailable = pod_count(rolling.get("maxUnavailable"), replicas)
    stopping = surge + max(1, unavailable)
    return min(2 * replicas, replicas + surge + stopping)


def _connections(d: Deployed, document: Document) -> int:
    """Return the connections of a pod: a worker is one process, the API has several."""
    settings = d.settings_of(document)
    if component(document) == "api":
        return plan_workers(settings, api_resources(d)).connections_per_pod
    return max(MIN_CONNECTIONS, pod_connections(settings, workers=1))


@rule
def autoscaler_sets_the_replicas_of_the_api(d: Deployed) -> Problems:
    deployment = d.one("Deployment")
    hpa = d.one("HorizontalPodAutoscaler")
    why = "each apply would reset the number that the HorizontalPodAutoscaler has set"
    yield from expect(deployment, "spec", why, replicas=None)
    target = {"kind": "Deployment", "name": deployment["metadata"]["name"], "apiVersion": "apps/v1"}
    yield from expect(hpa, "spec", "the autoscaler scales the API", scaleTargetRef=target)


@rule
def autoscaler_keeps_enough_pods_and_does_not_flap(d: Deployed) -> Problems:
    hpa = d.one("HorizontalPodAutoscaler")
    minimum = 1 if d.overlay == "dev" else 2
    maximum = at(hpa, "spec.maxReplicas") or 0
    why = "a single pod is unavailable while its node is drained"
    yield from expect_between(hpa, "spec.minReplicas", minimum, maximum, why)
    path = "spec.behavior.scaleDown.stabilizationWindowSeconds"
    yield from expect_between(hpa, path, 120, 3600, "the number of pods must not flap")
    why = "more load must add pods"
    yield from expect(hpa, "spec.behavior.scaleUp", why, selectPolicy=None)


@rule
def autoscaler_adds_pods_before_the_cpu_limit(d: Deployed) -> Problems:
    """`averageUtilization` is a percentage of the request, not of the limit."""
    percent = _cpu_target(d.one("HorizontalPodAutoscaler"))
    if not percent:
        yield (
            "HorizontalPodAutoscaler: spec.metrics has no averageUtilization of cpu; set it to 140"
        )
        return
    cores = percent / 100 * _requested_cores(d)
    limit = api_resources(d).cpus
    prefix = (
        f"HorizontalPodAutoscaler: averageUtilization is {percent}, which is {cores:g} cores of "
        "the request"
    )
    if cores > MAX_CPU_TARGET * limit:
        yield (
            f"{prefix}, over {MAX_CPU_TARGET:.0%} of the limit, so pods are added too late or "
            "never; lower it, or the request"
        )
    elif cores < MIN_CPU_TARGET * limit:
        yield (
            f"{prefix}, under {MIN_CPU_TARGET:.0%} of the limit, so pods are added that idle; "
            "raise it, or the request"
        )


def _requested_cores(d: Deployed) -> float:
    return quantity_at(d.one("Deployment"), f"{CONTAINER}.resources.requests.cpu")


def _cpu_target(hpa: Document) -> int | None:
    """Return the `averageUtilization` of the CPU, or None."""
    for metric in at(hpa, "spec.metrics") or []:
        if at(metric, "resource.name") == "cpu":
            target: int | None = at(metric, "resource.target.averageUtilization")
            return target
    return None


@rule
def every_container_has_requests_and_limits(d: Deployed) -> Problems:
    for document in d.pods:
        for place in d.containers(document):
            for name in ("cpu", "memory", "ephemeral-storage"):
                yield from _resource_problems(document, place, name)


def _resource_problems(document: Document, place: str, name: str) -> Problems:
    request_path = f"{place}.resources.requests.{name}"
    limit_path = f"{place}.resources.limits.{name}"
    try:
        is_over = quantity_at(document, request_path) > quantity_at(document, limit_path)
    except UnreadableError as error:
        yield str(error)
        return
    request = at(document, request_path)
    limit = at(document, limit_path)
    prefix = f"{document['kind']}: {request_path} is {request}"
    if is_over:
        yield f"{prefix}; set it to the limit, {limit}, or less"
    elif name == "memory" and request != limit:
        yield f"{prefix}; set it to the limit, {limit}, or a full node evicts the pod"


@rule
def temporary_directories_are_mounted(d: Deployed) -> Problems:
    for document in d.pods:
        mounts = _mounts(d, document)
        for path in _temporary_directories(document):
            if path not in mounts:
                yield (
                    f"{document['kind']}: {CONTAINER}.volumeMounts has no {path}; add it: the root "
                    "file system is read-only"
                )


@rule
def mounts_are_read_only_or_small_and_in_memory(d: Deployed) -> Problems:
    for document in d.pods:
        for path, mount in _mounts(d, document).items():
            if _memory_limit(document, mount) is None and not mount.get("readOnly"):
                yield (
                    f"{document['kind']}: the mount of {path} can be written to; set readOnly, or "
                    "make it an emptyDir with `medium: Memory` and a sizeLimit at "
                    f"{TEMPORARY_DIRECTORY} or {SHARED_MEMORY}"
                )


@rule
def processes_and_files_fit_into_the_memory_limit(d: Deployed) -> Problems:
    resources = api_resources(d)
    workers = plan_workers(d.settings, resources).workers
    processes = BASE_MEMORY_MB + workers * d.settings.worker_memory_mb
    for document in d.pods:
        if component(document) != "api":
            continue
        files = memory_of_files(d, document)
        if processes + files > resources.megabytes:
            yield (
                f"{document['kind']}: {POD}.volumes: {files:g} MB of files in memory and "
                f"{processes} MB for processes exceed the limit of {resources.megabytes} MB: "
                "lower a sizeLimit, or raise resources.limits.memory"
            )


@rule
def bodies_fit_into_the_temporary_directory(d: Deployed) -> Problems:
    """Files of forms over 1 MiB are written there; see docs/uploads.md."""
    document = d.one("Deployment")
    workers = plan_workers(d.settings, api_resources(d)).workers
    bodies = workers * d.settings.max_buffered_bytes / MEGABYTE
    mount = _mounts(d, document).get(TEMPORARY_DIRECTORY)
    space = _memory_limit(document, mount) if mount else None
    if space is not None and bodies > space:
        yield (
            f"Deployment: {POD}.volumes: {TEMPORARY_DIRECTORY} has {space:g} MB, and {workers} x "
            f"MAX_BUFFERED_BYTES={d.settings.max_buffered_bytes} need {bodies:g} MB: raise its "
            "sizeLimit and resources.limits.memory, or lower MAX_BUFFERED_BYTES"
        )


def memory_of_files(d: Deployed, document: Document) -> float:
    """Return the megabytes that files in memory may use in a pod."""
    return sum(_memory_limit(document, each) or 0 for each in _mounts(d, document).values())


def _temporary_directories(document: Document) -> list[str]:
    if component(document) == "api":
        return [TEMPORARY_DIRECTORY, SHARED_MEMORY]
    return [TEMPORARY_DIRECTORY]


def _mounts(d: Deployed, document: Document) -> dict[str, Document]:
    """Return the mounts of a pod by their path."""
    return {mount["mountPath"]: mount for mount in d.container(document).get("volumeMounts", [])}


def _memory_limit(document: Document, mount: Document) -> float | None:
    """Return the megabytes that files in a mount may use, or None if it is not such a directory.

    Raises `UnreadableError` if the limit is not a quantity.
    """
    if mount["mountPath"] not in {TEMPORARY_DIRECTORY, SHARED_MEMORY}:
        return None
    for number, volume in enumerate(at(document, f"{POD}.volumes") or []):
        directory = volume.get("emptyDir") or {}
        is_in_memory = directory.get("medium") == "Memory" and "sizeLimit" in directory
        if volume["name"] == mount["name"] and is_in_memory:
            path = f"{POD}.volumes.{number}.emptyDir.sizeLimit"
            return quantity_at(document, path) / MEGABYTE
    return None
