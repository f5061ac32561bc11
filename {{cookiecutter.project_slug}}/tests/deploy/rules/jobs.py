"""Rules for the workers that do the jobs: processes, memory, RabbitMQ, and KEDA."""

import math
import re

from tests.deploy.checking import (
    CONTAINER,
    MEGABYTE,
    Problems,
    expect,
    expect_between,
    quantity_at,
    rule,
    show,
)
from tests.deploy.deployed import POD, Deployed, Document, at, component, scaler_of
from tests.deploy.rules.capacity import memory_of_files

#: Memory of a worker, of each of its processes, and the share that is added for what the functions
#: import and for peaks. Measured: docs/jobs.md.
WORKER_MEGABYTES = 70
PROCESS_MEGABYTES = 15
PEAK = 1.2
#: KEDA asks for the number of workers, so one of them is the target.
TARGET = "1"
#: The longest that a job may wait for KEDA to notice it.
MAX_POLLING_SECONDS = 30
#: The parts of KEDA's login. Whole URLs of two scalers could be mixed up.
LOGIN = {"host", "port", "dbName", "userName", "password", "sslmode"}


def jobs(d: Deployed) -> list[Document]:
    """Return the Deployment of the jobs, or nothing."""
    return [document for document in d.all("Deployment") if component(document) == "jobs"]


def scalers(d: Deployed) -> list[Document]:
    """Return the ScaledObject of the jobs, or nothing."""
    found = [scaler_of(d, document) for document in jobs(d)]
    return [scaler for scaler in found if scaler]


@rule
def jobs_have_whole_cpus(d: Deployed) -> Problems:
    for document in jobs(d):
        cpus = quantity_at(document, f"{CONTAINER}.resources.limits.cpu")
        if cpus < 1 or cpus != int(cpus):
            yield (
                f"Deployment jobs: resources.limits.cpu is {cpus:g}; set it to a whole number: "
                "there is one process for each CPU"
            )


@rule
def job_processes_fit_into_the_limits(d: Deployed) -> Problems:
    for document in jobs(d):
        cpus = quantity_at(document, f"{CONTAINER}.resources.limits.cpu")
        limit = quantity_at(document, f"{CONTAINER}.resources.limits.memory") / MEGABYTE
        processes = d.settings_of(document).job_processes or max(1, int(cpus))
        if processes > cpus:
            yield (
                f"ConfigMap: JOB_PROCESSES is {processes} and the CPU limit {cpus:g}; "
                "set JOB_PROCESSES to the limit or less: more processes only wait"
            )
        files = memory_of_files(d, document)
        memory = PEAK * (WORKER_MEGABYTES + PROCESS_MEGABYTES * processes)
        needed = math.ceil(memory + files)
        if needed > limit:
            yield (
                f"Deployment jobs: resources.limits.memory is {limit:g} MB; set it to {needed} MB "
                f"or more: {PEAK:g} x ({WORKER_MEGABYTES} + {PROCESS_MEGABYTES} x {processes} "
                f"processes) + {files:g} of files"
            )


@rule
def only_workers_have_the_login_to_rabbitmq(d: Deployed) -> Problems:
    for document in d.pods:
        if component(document) != "jobs" and "amqp_url" in d.secrets(document):
            yield (
                f"{document['kind']}: {POD}.volumes has amqp_url; remove it: "
                "only the workers connect to RabbitMQ"
            )


@rule
def keda_removes_workers_slowly(d: Deployed) -> Problems:
    behavior = "spec.advanced.horizontalPodAutoscalerConfig.behavior"
    for scaler in scalers(d):
        window = f"{behavior}.scaleDown.stabilizationWindowSeconds"
        why = "a worker that is stopped leaves jobs to others, so the number must not flap"
        yield from expect_between(scaler, window, 120, 3600, why)
        why = "one worker at a time"
        slow = {"type": "Pods", "value": 1, "periodSeconds": 60}
        yield from expect(scaler, f"{behavior}.scaleDown", why, policies=[slow])
        yield from expect(scaler, f"{behavior}.scaleUp", "more jobs", selectPolicy=None)
        why = "jobs wait until KEDA asks"
        yield from expect_between(scaler, "spec.pollingInterval", 1, MAX_POLLING_SECONDS, why)
        why = "without Postgres no worker can work"
        yield from expect(scaler, "spec", why, fallback=None, idleReplicaCount=None)


@rule
def keda_asks_postgres_for_the_number_of_workers(d: Deployed) -> Problems:
    for scaler in scalers(d):
        trigger = "spec.triggers.0"
        why = "Postgres has every job that is due; a queue lacks those that are not published"
        yield from expect(scaler, trigger, why, type="postgresql", metricType=None)
        why = "the query returns the number of workers"
        yield from expect(scaler, f"{trigger}.metadata", why, targetQueryValue=TARGET)
        (worker,) = jobs(d)
        concurrency = d.settings_of(worker).job_concurrency
        query = str(at(scaler, f"{trigger}.metadata.query"))
        if f"/ {concurrency}.0" not in query:
            yield (
                f"ScaledObject: {trigger}.metadata.query is {query!r}; divide the running jobs by "
                f"JOB_CONCURRENCY={concurrency}"
            )
        yield from _limit_problems(scaler, query)


def _limit_problems(scaler: Document, query: str) -> Problems:
    """Yield a problem unless the counted jobs suffice for the maximum number of workers."""
    maximum = at(scaler, "spec.maxReplicaCount") or 0
    found = re.search(r"limit (\d+)\D+ as \w+\) / (\d+)\.0", query)
    if not found or int(found[1]) < maximum * int(found[2]):
        yield (
            f"ScaledObject: spec.triggers.0.metadata.query is {query!r}; make its limit "
            f"maxReplicaCount={maximum} x the waiting jobs of a worker, or more"
        )


@rule
def keda_has_its_own_login(d: Deployed) -> Problems:
    logins = {each["metadata"]["name"]: each for each in d.all("TriggerAuthentication")}
    for scaler in scalers(d):
        name = at(scaler, "spec.triggers.0.authenticationRef.name")
        targets = at(logins.get(name, {}), "spec.secretTargetRef") or []
        found = {target["parameter"] for target in targets}
        if found != LOGIN:
            yield (
                f"ScaledObject: authenticationRef is {show(name)}, with {sorted(found)}; name a "
                f"TriggerAuthentication with {sorted(LOGIN)}"
            )
        if any(target["name"] in _secrets_of_pods(d) for target in targets):
            yield (
                "TriggerAuthentication: spec.secretTargetRef has the Secret of the pods; name one "
                "with a login that can only read the table of the jobs"
            )


def _secrets_of_pods(d: Deployed) -> set[str]:
    """Return the names of the Secrets that pods mount."""
    names = set()
    for document in d.pods:
        for volume in d.secret_volumes(document):
            for source in volume["projected"]["sources"]:
                names.add(str(at(source, "secret.name")))
    return names
