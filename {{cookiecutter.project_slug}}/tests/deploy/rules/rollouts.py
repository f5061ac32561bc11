"""Rules for rollouts, node drains and the migration: pods that serve are never all replaced."""

from tests.deploy.checking import CONTAINER, Problems, expect, expect_between, pod_count, rule, show
from tests.deploy.deployed import COMPONENT_LABEL, MIGRATE, POD, Deployed, at, component

#: The kinds that the migration needs, too. It is applied first: docs/runbook.md selects it by the
#: component label, which these do not have.
SHARED = {"Namespace", "ServiceAccount", "ConfigMap", "Secret", "NetworkPolicy"}
STRATEGY = "spec.strategy.rollingUpdate"


@rule
def rollout_starts_a_pod_before_it_stops_one(d: Deployed) -> Problems:
    deployment = d.one("Deployment")
    why = "the pods that serve must stay until others are ready"
    yield from expect(deployment, "spec.strategy", why, type="RollingUpdate")
    unavailable = at(deployment, f"{STRATEGY}.maxUnavailable")
    if unavailable not in {0, "0%"}:
        yield (f"Deployment: {STRATEGY}.maxUnavailable is {show(unavailable)}; set it to 0: {why}")
    surge = at(deployment, f"{STRATEGY}.maxSurge")
    if pod_count(surge, total=10) < 1:
        yield f"Deployment: {STRATEGY}.maxSurge is {show(surge)}; set it to 1: {why}"


@rule
def rollout_detects_failure_and_can_be_undone(d: Deployed) -> Problems:
    deployment = d.one("Deployment")
    why = "an applied change must be rolled out"
    yield from expect(deployment, "spec", why, paused=None)
    why = "a pod that crashes at once must stop the rollout"
    yield from expect_between(deployment, "spec.minReadySeconds", 5, 60, why)
    why = "a stuck rollout must be reported"
    yield from expect_between(deployment, "spec.progressDeadlineSeconds", 120, 900, why)
    why = "`kubectl rollout undo` needs earlier revisions"
    yield from expect_between(deployment, "spec.revisionHistoryLimit", 2, 20, why)


@rule
def node_drain_evicts_some_pods_but_not_all(d: Deployed) -> Problems:
    budget = d.one("PodDisruptionBudget")
    pods = at(d.one("HorizontalPodAutoscaler"), "spec.minReplicas") or 1
    unavailable = at(budget, "spec.maxUnavailable")
    available = at(budget, "spec.minAvailable")
    if unavailable is None:
        evicted = pods - pod_count(available, pods)
    else:
        evicted = pod_count(unavailable, pods)
    if evicted < 1 or evicted >= pods > 1:
        yield (
            f"PodDisruptionBudget: maxUnavailable is {show(unavailable)} and minAvailable "
            f"{show(available)}, so {evicted} of {pods} pods can be evicted; set maxUnavailable to "
            "1: with 0 no node can be drained, with all no pod serves"
        )
    why = "a pod that is not ready would block a node drain forever"
    yield from expect(budget, "spec", why, unhealthyPodEvictionPolicy="AlwaysAllow")


@rule
def pods_are_spread_but_never_left_pending(d: Deployed) -> Problems:
    deployment = d.one("Deployment")
    why = "pods are spread over zones, but never left pending"
    zones = {"topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway"}
    yield from expect(deployment, f"{POD}.topologySpreadConstraints.0", why, **zones)
    why = "pods are spread over nodes, but never left pending"
    affinity = f"{POD}.affinity.podAntiAffinity"
    required = {"requiredDuringSchedulingIgnoredDuringExecution": None}
    yield from expect(deployment, affinity, why, **required)
    preferred = f"{affinity}.preferredDuringSchedulingIgnoredDuringExecution.0.podAffinityTerm"
    yield from expect(deployment, preferred, why, topologyKey="kubernetes.io/hostname")


@rule
def component_labels_let_the_migration_be_applied_first(d: Deployed) -> Problems:
    why = "docs/runbook.md selects the objects to apply first by this label"
    for document in d.documents:
        kind = document["kind"]
        label = component(document)
        prefix = f"{kind}: the label {COMPONENT_LABEL} is {show(label)}"
        if kind in SHARED:
            if label:
                yield f"{prefix}; remove it: {why}"
        elif kind == "Job" and label != "migrate":
            yield f"{prefix}; set it to migrate: {why}"
        elif kind != "Job" and label in {None, "", "migrate"}:
            yield f"{prefix}; set it to api: {why}"


@rule
def migration_runs_once_and_ends(d: Deployed) -> Problems:
    if d.migrates_in_pods:
        return
    job = d.one("Job")
    why = "the exit status must be that of alembic"
    yield from expect(job, CONTAINER, why, command=MIGRATE, args=None)
    why = "the migration runs once, as soon as it is applied"
    yield from expect(job, "spec", why, suspend=None, parallelism=None, completions=None)
    yield from expect(job, POD, "each attempt must keep its log", restartPolicy="Never")
    why = "a migration that always fails must end"
    yield from expect_between(job, "spec.backoffLimit", 0, 5, why)
    why = "a migration that waits for a lock must end"
    yield from expect_between(job, "spec.activeDeadlineSeconds", 60, 3600, why)
    why = "its log stays readable for a while, then the Job is deleted"
    yield from expect_between(job, "spec.ttlSecondsAfterFinished", 60, 86400, why)
