"""Rules about numbers that have to agree: probes and timeouts, the end and its grace, pods and connections, memory."""

from starlette.routing import Match

from app.main import create_app
from app.sizing.checks import check_settings
from app.sizing.plan import BASE_MEMORY_MB, plan_workers
from tests.deploy.deployed import Deployed, UnreadableError, at, component, duration, quantity
from tests.deploy.rules import CONTAINER, POD, Faults, bounded, budget, expect, limits, rule, share

PROBES = {
    "startupProbe": "/health/startup",
    "livenessProbe": "/health/live",
    "readinessProbe": "/health/ready",
}
READINESS_MARGIN_SECONDS = 2  # of the drain, for the endpoint's way to the balancers
WORKER_MARGIN_SECONDS = 5  # from a stuck worker to the one that has replaced it
CONSTANT_CONNECTIONS = {"migration": 1, "that Postgres reserves": 3}
MOST_OF_A_CPU = (
    0.8  # that the autoscaler may aim at: the rest is for the time until the next pod is ready
)
INGRESS_KEEPALIVE_SECONDS = (
    60  # ingress-nginx, AWS' load balancers, and most others, unless told otherwise
)
LEAST_OF_A_CPU = 0.5  # a percentage is of the request, and not of the limit
MEGABYTE = 1 << 20
IN_MEMORY = ("/tmp", "/dev/shm")


@rule
def probes_ask_for_what_the_app_answers(d: Deployed) -> Faults:
    app = create_app(d.settings)
    for name, path in PROBES.items():
        probe, place = d.api.get(name), f"{CONTAINER}.{name}"
        if not probe:
            yield f"Deployment: {place} is missing; add one for {path}"
            continue
        scope = {"type": "http", "method": "GET", "path": path, "root_path": "", "headers": []}
        if not any(route.matches(scope)[0] is Match.FULL for route in app.routes):
            yield f"app/health.py: GET {path} is no route of the app, but {name} asks for it"
        why = "each probe has a question of its own, and the end has one grace for all"
        wanted = {
            "httpGet__path": path,
            "httpGet__port": "http",
            "terminationGracePeriodSeconds": None,
        }
        wanted |= dict.fromkeys(
            ("httpGet__scheme", "httpGet__host", "initialDelaySeconds", "successThreshold")
        )
        yield from expect(d.one("Deployment"), place, why, **wanted)
        period, why = (
            probe.get("periodSeconds", 10),
            "a busy node misses 1 s, and a probe ends before the next",
        )
        yield from bounded(d.one("Deployment"), f"{place}.timeoutSeconds", 2, period, why)


@rule
def probes_are_as_patient_as_what_they_ask_about(d: Deployed) -> Faults:
    settings, deadline = d.settings, at(d.one("Deployment"), "spec.progressDeadlineSeconds") or 600
    started, gone = budget(d.api.get("startupProbe")), budget(d.api.get("livenessProbe"))
    answer = at(d.api, "readinessProbe.timeoutSeconds") or 1
    if answer <= settings.readiness_timeout_seconds:
        yield (
            f"Deployment: readinessProbe.timeoutSeconds is {answer}; READINESS_TIMEOUT_SECONDS is "
            f"{settings.readiness_timeout_seconds:g}, and has to be shorter, or nobody sees which check failed"
        )
    if not 20 <= started < deadline:
        yield (
            f"Deployment: startupProbe fails after {started} s (periodSeconds x failureThreshold); set 20 s or more, "
            f"for a slow node, and less than spec.progressDeadlineSeconds, {deadline} s"
        )
    if gone <= (replaced := settings.worker_timeout_seconds + WORKER_MARGIN_SECONDS):
        yield (
            f"Deployment: livenessProbe fails after {gone} s (periodSeconds x failureThreshold); set it over "
            f"WORKER_TIMEOUT_SECONDS + {WORKER_MARGIN_SECONDS} = {replaced} s, so that gunicorn replaces a stuck "
            "worker, and not the kubelet the pod"
        )


@rule
def ports_are_those_that_the_service_listens_on(d: Deployed) -> Faults:
    ports = {port.get("name"): port.get("containerPort") for port in d.api.get("ports", [])}
    addresses = (
        ("http", "BIND", d.gunicorn["bind"]),
        ("metrics", "METRICS_BIND", d.settings.metrics_bind),
    )
    for name, setting, address in addresses:
        host, _, port = address.rpartition(":")
        if ports.get(name) != int(port):
            yield f"Deployment: the port {name!r} is {ports.get(name)}, and {setting} is {address}: make them agree"
        if host not in {"0.0.0.0", "[::]"}:
            yield f"ConfigMap: {setting}={address} hears nobody outside of the pod: set it to 0.0.0.0:{port}"


@rule
def the_end_fits_into_the_grace(d: Deployed) -> Faults:
    settings, deployment = d.settings, d.one("Deployment")
    yield from expect(
        deployment,
        CONTAINER,
        "the service drains itself; a preStop only adds to that",
        lifecycle=None,
    )
    why = "it is TERMINATION_GRACE_SECONDS of the ConfigMap"
    yield from expect(
        deployment, POD, why, terminationGracePeriodSeconds=settings.termination_grace_seconds
    )
    unready, drained = (
        budget(d.api.get("readinessProbe")),
        settings.drain_seconds - READINESS_MARGIN_SECONDS,
    )
    if unready > drained:
        yield (
            f"Deployment: readinessProbe fails after {unready} s (periodSeconds x failureThreshold); set it to "
            f"DRAIN_SECONDS - {READINESS_MARGIN_SECONDS} = {drained:g} s or less, or requests come after the drain"
        )
    for name in ("graceful_timeout_seconds", "worker_timeout_seconds", "keepalive_seconds"):
        key = {"worker_timeout_seconds": "timeout"}.get(name, name.removesuffix("_seconds"))
        if d.gunicorn[key] != getattr(settings, name):
            yield f"gunicorn.conf.py: {key} is {d.gunicorn[key]}; set it to settings.{name}, with which all else agrees"


@rule
def the_doctor_finds_nothing_in_a_pod(d: Deployed) -> Faults:
    """The rest of the arithmetic is that of `make doctor`: app/sizing.py."""
    machine = limits(d)
    workers = plan_workers(d.settings, machine).workers
    for text in check_settings(
        d.settings, machine, workers, replicas=0
    ):  # connections are added up below, with the surge
        yield f"ConfigMap: {text}"
    if machine.cpus < 1:
        yield f"Deployment: resources.limits.cpu is {machine.cpus:g}; set 1: below it an event loop is throttled"


@rule
def what_is_in_front_waits_for_answers_and_lets_go_of_connections_first(d: Deployed) -> Faults:
    longest = d.settings.request_timeout_seconds
    if (keeps := d.gunicorn["keepalive"]) <= INGRESS_KEEPALIVE_SECONDS:
        yield (
            f"ConfigMap: KEEPALIVE_SECONDS is {keeps}; set it over {INGRESS_KEEPALIVE_SECONDS}, for which ingresses "
            "keep connections, or they send into those that we are closing"
        )
    for route in d.all("HTTPRoute"):
        for number in range(len(at(route, "spec.rules") or [])):
            path = f"spec.rules.{number}.timeouts.request"
            if not (given := at(route, path)) or 0 < duration(str(given)) <= longest:  # 0s is none
                yield f"HTTPRoute: {path} is {given!r}; set it over REQUEST_TIMEOUT_SECONDS={longest:g}"


@rule
def postgres_carries_two_releases(d: Deployed) -> Faults:
    each, allowed = d.settings.database_max_connections, d.settings.postgres_max_connections
    most = at(d.one("HorizontalPodAutoscaler"), "spec.maxReplicas") or 0
    surge = share(at(d.one("Deployment"), "spec.strategy.rollingUpdate.maxSurge"), most)
    others = [document for document in d.all("Deployment") if component(document) != "api"]
    other_pods = sum(at(document, "spec.replicas") or 1 for document in others)
    pods = 2 * (most + other_pods) + surge
    total = pods * each + sum(CONSTANT_CONNECTIONS.values())
    if total > allowed:
        constant = " + ".join(f"{number} ({what})" for what, number in CONSTANT_CONNECTIONS.items())
        yield (
            f"HorizontalPodAutoscaler: maxReplicas is {most}; with maxSurge {surge} a rollout has up to {pods} pods: "
            f"{pods} x DATABASE_MAX_CONNECTIONS={each} + {constant} = {total} connections are over "
            f"POSTGRES_MAX_CONNECTIONS={allowed}: lower one of the first two, or use the component egress-pgbouncer"
        )


@rule
def the_autoscaler_owns_the_replicas_and_acts_before_the_limit(d: Deployed) -> Faults:
    deployment, hpa = d.one("Deployment"), d.one("HorizontalPodAutoscaler")
    yield from expect(
        deployment,
        "spec",
        "each apply would undo what the HorizontalPodAutoscaler decided",
        replicas=None,
    )
    target = {"kind": "Deployment", "name": deployment["metadata"]["name"], "apiVersion": "apps/v1"}
    yield from expect(hpa, "spec", "it scales the API", scaleTargetRef=target)
    least, most = 1 if d.overlay == "dev" else 2, at(hpa, "spec.maxReplicas") or 0
    yield from bounded(
        hpa, "spec.minReplicas", least, most, "one pod is none while its node is drained"
    )
    yield from bounded(
        hpa, "spec.behavior.scaleDown.stabilizationWindowSeconds", 120, 3600, "it would flap"
    )
    metrics = [
        metric for metric in at(hpa, "spec.metrics") or [] if at(metric, "resource.name") == "cpu"
    ]
    if not (percent := at(metrics, "0.resource.target.averageUtilization")):
        yield "HorizontalPodAutoscaler: spec.metrics has no averageUtilization of cpu; set it to 140"
    elif (
        cores := percent / 100 * quantity(at(d.api, "resources.requests.cpu"))
    ) > MOST_OF_A_CPU * limits(d).cpus:
        yield (
            f"HorizontalPodAutoscaler: averageUtilization is {percent}; of the request that is {cores:g} cores, over "
            f"{MOST_OF_A_CPU:.0%} of the limit, so it acts too late or never: lower it, or the request"
        )
    elif cores < LEAST_OF_A_CPU * limits(d).cpus:
        yield (
            f"HorizontalPodAutoscaler: averageUtilization is {percent}; of the request that is {cores:g} cores, under "
            f"{LEAST_OF_A_CPU:.0%} of the limit, so it adds pods that idle: raise it, or the request"
        )
    why = "a rise in load adds pods"
    yield from expect(hpa, "spec.behavior.scaleUp", why, selectPolicy=None)


@rule
def memory_and_cpu_are_bounded_and_memory_is_reserved(d: Deployed) -> Faults:
    for document in d.pods:
        for place in d.containers(document):
            asked, most = (
                at(document, f"{place}.resources.{name}") or {} for name in ("requests", "limits")
            )
            for name in ("cpu", "memory", "ephemeral-storage"):
                try:
                    over = quantity(asked.get(name)) > quantity(most.get(name))
                except UnreadableError as error:
                    yield f"{document['kind']}: {place}.resources: {name}: {error}"
                else:
                    if over or (name == "memory" and asked[name] != most[name]):
                        yield (
                            f"{document['kind']}: {place}.resources: {name} is requested as {asked[name]}, and limited "
                            f"to {most[name]}: make memory the same, and no request more than its limit"
                        )


@rule
def what_can_be_written_to_is_small_and_in_memory(d: Deployed) -> Faults:
    planned = (
        BASE_MEMORY_MB + plan_workers(d.settings, limits(d)).workers * d.settings.worker_memory_mb
    )
    for document in d.pods:
        is_api, used, kind = component(document) == "api", 0.0, document["kind"]
        volumes = {volume["name"]: volume for volume in at(document, f"{POD}.volumes") or []}
        mounts = {
            mount["mountPath"]: mount for mount in d.container(document).get("volumeMounts", [])
        }
        for path in IN_MEMORY if is_api else IN_MEMORY[:1]:
            if path not in mounts:
                yield f"{kind}: {CONTAINER}.volumeMounts has no {path}; add it: the root is read-only"
        for path, mount in mounts.items():
            folder = at(volumes, f"{mount['name']}.emptyDir") or {}
            if path in IN_MEMORY and folder.get("medium") == "Memory" and "sizeLimit" in folder:
                used += quantity(folder["sizeLimit"]) / MEGABYTE
            elif not mount.get("readOnly"):
                yield f"{kind}: {path} is to be readOnly, or an emptyDir with `medium: Memory` and a sizeLimit"
        if is_api and planned + used > limits(d).megabytes:
            yield (
                f"{kind}: {POD}.volumes: {used:g} MB in memory and {planned} MB for processes are over the limit of "
                f"{limits(d).megabytes} MB: lower a sizeLimit, or raise resources.limits.memory"
            )


@rule
def a_rollout_takes_no_pod_before_another_is_ready(d: Deployed) -> Faults:
    deployment, strategy = d.one("Deployment"), "spec.strategy.rollingUpdate"
    yield from expect(deployment, "spec.strategy", "the pods that serve stay", type="RollingUpdate")
    yield from expect(deployment, "spec", "what is applied is rolled out", paused=None)
    if at(deployment, f"{strategy}.maxUnavailable") not in {0, "0%"}:
        yield f"Deployment: {strategy}.maxUnavailable is not 0; set it, so that the pods that serve stay"
    if share(at(deployment, f"{strategy}.maxSurge"), 10) < 1:
        yield f"Deployment: {strategy}.maxSurge lets no pod in; set it to 1"
    yield from bounded(
        deployment, "spec.minReadySeconds", 5, 60, "a pod that dies at once stops the rollout"
    )
    yield from bounded(
        deployment, "spec.progressDeadlineSeconds", 120, 900, "a rollout that is stuck is told"
    )
    yield from bounded(
        deployment, "spec.revisionHistoryLimit", 2, 20, "there is something to go back to"
    )


@rule
def a_drain_of_nodes_takes_some_pods_and_never_all(d: Deployed) -> Faults:
    disruption, least = (
        d.one("PodDisruptionBudget"),
        at(d.one("HorizontalPodAutoscaler"), "spec.minReplicas") or 1,
    )
    away, stay = at(disruption, "spec.maxUnavailable"), at(disruption, "spec.minAvailable")
    allowed = least - share(stay, least) if away is None else share(away, least)
    if allowed < 1 or allowed >= least > 1:
        yield (
            f"PodDisruptionBudget: maxUnavailable is {away}, minAvailable {stay}, so {allowed} of {least} pods may go: "
            "set maxUnavailable to 1; with none no node is ever drained, with all nobody serves"
        )
    why = "a pod that is not ready would hold up a drain for ever"
    yield from expect(disruption, "spec", why, unhealthyPodEvictionPolicy="AlwaysAllow")
