"""Benchmark the generated service: `make bench`, or `make bench QUICK=1` for one short round.

All compared servers are measured in one run, in alternating rounds, so that a slowdown of the
machine affects all of them. The first round is not counted. Results go to `benchmarks/` and into
README.md; those of a quick run go to a temporary directory.
"""

import contextlib
import datetime
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any, NoReturn

import psutil

from benchmarks import BenchError, consumer, instructions, load, report
from benchmarks.collector import run_collector
from benchmarks.peer import PACKAGE, PINS, VERSION, Peer
from benchmarks.servers import Server, fetch
from benchmarks.testbed import POOL_SIZE, Testbed, open_testbed, python, versions
from scripts.demo import ROOT

HERE = Path(__file__).parent
STARTED = time.monotonic()
#: Seconds after which a client of the load ramp gives up.
PATIENCE_SECONDS = 1.0
#: Duration of each query in the load ramp: the database pool is the bottleneck, not the CPU.
QUERY_SECONDS = 0.01
#: The service's in-flight limit in the load ramp: requests that wait are served long before
#: clients give up.
MAX_IN_FLIGHT = 32
#: Upper limit for the number of open files that the run asks for.
MAX_OPEN_FILES = 65536
PEER_HEALTH = "/api/health"
#: The parts of the requests that are traced, as `OTEL_TRACES_SAMPLER_ARG`.
TRACE_RATIOS = {"10": "0.1", "100": "1"}

Figures = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """The size of a run: rounds, durations, numbers of workers, offered rates."""

    rounds: int
    warm_up_rounds: int
    seconds: float
    starts: int
    settle_seconds: float
    idle_seconds: float
    workers: tuple[int, ...]
    rates: tuple[int, ...]
    ramp_seconds: float


FULL = Size(
    rounds=5,
    warm_up_rounds=1,
    seconds=4,
    starts=3,
    settle_seconds=3,
    idle_seconds=20,
    workers=(1, 2, 3, 4),
    rates=(300, 500, 700, 1000, 1500, 2000, 3000),
    ramp_seconds=4,
)
QUICK = Size(
    rounds=1,
    warm_up_rounds=0,
    seconds=1,
    starts=1,
    settle_seconds=0.5,
    idle_seconds=1,
    workers=(1, 2),
    rates=(300, 1500),
    ramp_seconds=1,
)


def print_progress(text: str) -> None:
    """Print a line of progress, with the seconds since the start."""
    sys.stdout.write(f"{time.monotonic() - STARTED:6.1f} s  {text}\n")
    sys.stdout.flush()


def alternate(
    title: str,
    servers: dict[str, Server],
    size: Size,
    connections: int = load.CONNECTIONS,
    script: str = "wrk.lua",
) -> Figures:
    """Load each server in turn, several times; print the medians, return the counted runs."""
    runs: dict[str, list[load.Run]] = {name: [] for name in servers}
    rounds = size.warm_up_rounds + size.rounds
    plan = f"{rounds} rounds of {size.seconds:g} s for each of {len(servers)} servers"
    print_progress(f"{title}: {plan} ...")
    for number in range(rounds):
        for name, server in servers.items():
            run = load.measure(server, size.seconds, connections, script)
            if number >= size.warm_up_rounds:
                runs[name].append(run)
    figures = {}
    for name, server in servers.items():
        figures[name] = by_field(runs[name])
        print_progress(f"  {server.name}, {name}: {describe(figures[name])}")
    return figures


def by_field(runs: list[load.Run]) -> dict[str, list[float]]:
    """Return the runs as one list for each figure."""
    return {field: [run._asdict()[field] for run in runs] for field in load.Run._fields}


def describe(runs: dict[str, list[float]]) -> str:
    """Return the medians of some runs as one line."""
    cpu = f"{median(runs['cpu_us']):.0f} us CPU per request"
    rate = f"{median(runs['requests_per_second']):,.0f} requests/s"
    return f"{cpu}, {rate}, p99 {median(runs['p99_ms']):.1f} ms"


def require_same_response(first: Server, second: Server) -> None:
    """Raise `BenchError` unless two servers return the same response."""
    one = fetch(first.url)
    other = fetch(second.url)
    if one != other:
        names = f"{first.name} and {second.name}"
        raise BenchError(f"{names} return different responses: {one} and {other}")


def measure_small(testbed: Testbed, peer: Peer | None, size: Size) -> Figures:
    """Measure a small JSON response, on one worker each."""
    with contextlib.ExitStack() as stack:
        bare = stack.enter_context(testbed.bare())
        servers = {"bare": bare, "service": stack.enter_context(testbed.service())}
        if peer:
            for pin in PINS:
                servers[pin] = stack.enter_context(peer.server(variant=pin))
        for server in servers.values():
            require_same_response(bare, server)
        if peer:
            for pin in PINS:
                health = peer.server(PEER_HEALTH, variant=pin)
                servers[f"{pin}_health"] = stack.enter_context(health)
        return alternate("small JSON", servers, size)


def measure_traces(testbed: Testbed, size: Size) -> Figures:
    """Measure the small JSON response without traces, with a tenth of them, and with all.

    `without` is the service without the code of tracing in its middleware.
    """
    with contextlib.ExitStack() as stack:
        collector = stack.enter_context(run_collector())
        servers = {
            "without": stack.enter_context(testbed.service(app="untraced")),
            "off": stack.enter_context(testbed.service()),
        }
        for name, ratio in TRACE_RATIOS.items():
            settings = {
                "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint(name),
                "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
                "OTEL_TRACES_SAMPLER_ARG": ratio,
            }
            servers[name] = stack.enter_context(testbed.service("/", 1, "stored", **settings))
        figures = alternate("traces", servers, size)
    # The servers have sent their last spans.
    for name in TRACE_RATIOS:
        if name not in collector.received_bytes:
            raise BenchError(f"traces, {name} %: no spans arrived")
    return figures


def measure_query(testbed: Testbed, payment: str, size: Size) -> Figures:
    """Measure one Postgres query per request, on one worker each.

    `plain` is the service with FastAPI's own route instead of a QuickRoute.
    """
    with contextlib.ExitStack() as stack:
        servers = {
            "bare": stack.enter_context(testbed.bare("bare_postgres", payment)),
            "service": stack.enter_context(testbed.service(payment)),
            "plain": stack.enter_context(testbed.service(f"/plain{payment}")),
        }
        for server in servers.values():
            require_same_response(servers["bare"], server)
        return alternate("one query", servers, size)


def measure_post(testbed: Testbed, size: Size) -> Figures:
    """Measure creating a payment, with the same statement, on one worker each."""
    # Bare FastAPI has no rate limit, and its clients wait for a connection without one.
    limits = {"RATE_LIMIT_PER_MINUTE": "10000000", "DATABASE_ACQUIRE_TIMEOUT_SECONDS": "20"}
    with (
        testbed.bare("bare_post", "/payments") as bare,
        testbed.service("/payments", 1, **limits) as service,
    ):
        servers = {"bare": bare, "service": service}
        return alternate("POST", servers, size, load.POST_CONNECTIONS, "wrk_post.lua")


def measure_consumer(testbed: Testbed, size: Size) -> Figures:
    """Measure the consumer of payments."""
    print_progress(f"consumer: {size.rounds} rounds ...")
    figures = consumer.measure(testbed, size.rounds)
    rate = f"{consumer.per_cpu_second(figures):,.0f} events per second of CPU"
    share = f"{100 * consumer.share(figures):.0f} % of {consumer.CONCURRENCY} / latency"
    print_progress(f"  {rate}, {share}")
    return figures


def measure_instructions(testbed: Testbed, peer: Peer | None) -> Figures:
    """Count the instructions of each route, of one client; return nothing without valgrind."""
    try:
        instructions.require_valgrind()
    except BenchError as error:
        print_progress(f"instructions: skipped: {error}")
        return {}
    print_progress("instructions per request, by cachegrind ...")
    apps = testbed.directory / "apps"
    counts = instructions.measure(instructions.targets(testbed), apps)
    if peer:
        try:
            counts |= instructions.measure([peer_target(peer)], apps)
        except BenchError as error:
            print_progress(f"  {PACKAGE}: skipped: {error}")
    for name, routes in counts.items():
        shown = ", ".join(f"{route} {count:.0f}" for route, count in routes.items())
        print_progress(f"  {name}, in thousands: {shown}")
    return counts


def peer_target(peer: Peer) -> instructions.Target:
    """Return the peer as `instructions` counts it."""
    server = peer.server()
    routes = {"small": "peer.web.application/get_app:describe"}
    python = peer.pythons["peer"]
    return instructions.Target("peer", python, peer.project, routes, server.settings)


def measure_idle(testbed: Testbed, peer: Peer | None, size: Size) -> Figures:
    """Measure the seconds to the first 200, and memory and CPU of one and of two idle workers."""
    kinds: dict[str, Callable[[int], Server]] = {
        "bare": lambda workers: testbed.bare(workers=workers),
        "service": lambda workers: testbed.service("/health/live", workers),
    }
    if peer:
        kinds["peer"] = lambda workers: peer.server(PEER_HEALTH, workers)
    figures: Figures = {name: {"start_seconds": []} for name in kinds}
    for _ in range(size.starts):
        for name, kind in kinds.items():
            with kind(1) as server:
                figures[name]["start_seconds"].append(server.start_seconds)
    for name, kind in kinds.items():
        for workers in (1, 2):
            with kind(workers) as server:
                time.sleep(size.settle_seconds)
                figures[name][f"memory_{workers}"] = server.memory()
                if workers == 1:
                    figures[name]["cpu_ms"] = server.worker_cpu_ms(size.idle_seconds)
        print_progress(f"{server.name}: {describe_idle(figures[name])}")
    return figures


def describe_idle(figures: Figures) -> str:
    """Return start, memory and CPU of one server as one line."""
    start = f"first 200 after {median(figures['start_seconds']):.2f} s"
    rss = f"idle worker {figures['memory_1']['worker_rss_mb']:.0f} MB RSS"
    cpu = f"{figures['cpu_ms']:.1f} ms CPU per second"
    pss = figures["memory_2"].get("workers_pss_mb", float("nan"))
    return f"{start}, {rss}, {cpu}, two workers {pss:.0f} MB PSS"


def measure_workers(testbed: Testbed, payment: str, size: Size) -> Figures:
    """Measure numbers of workers, `2 x CPU + 1` among them, with equal pools, on one query."""
    numbers = sorted({*size.workers, 2 * (os.cpu_count() or 1) + 1})
    with contextlib.ExitStack() as stack:
        servers = {}
        for number in numbers:
            settings = {"DATABASE_MAX_CONNECTIONS": str((POOL_SIZE + 1) * number)}
            service = testbed.service(payment, number, **settings)
            servers[str(number)] = stack.enter_context(service)
        return alternate("workers", servers, size)


def measure_ramp(testbed: Testbed, payment: str, size: Size) -> Figures:
    """Offer rising load while each query is slow.

    Each rate starts with a fresh server, so that none inherits a queue.
    """
    testbed.slow_down(QUERY_SECONDS)
    figures: Figures = {"bare": [], "service": []}
    for rate in size.rates:
        servers = {
            "bare": testbed.bare("bare_postgres", payment),
            "service": testbed.service(payment, MAX_IN_FLIGHT=str(MAX_IN_FLIGHT)),
        }
        for name, server in servers.items():
            with server:
                outcome = load.ramp_step(
                    server, rate, 2 * PATIENCE_SECONDS, size.ramp_seconds, PATIENCE_SECONDS
                )
            figures[name].append(outcome._asdict())
            print_progress(f"{rate}/s offered, {server.name}: {describe_outcome(outcome)}")
    return figures


def describe_outcome(outcome: load.Outcome) -> str:
    """Return the outcome of one offered rate as one line."""
    p99 = "no 200" if outcome.p99_ms is None else f"p99 {outcome.p99_ms:.0f} ms"
    counts = f"{outcome.answered:.0f}/s served, {outcome.shed:.0f}/s shed"
    return f"{counts}, {outcome.given_up:.0f}/s given up, {p99}"


def machine(testbed: Testbed, peer: Peer | None, size: Size) -> Figures:
    """Return the conditions that the figures depend on."""
    wrk = subprocess.run(["wrk", "-v"], capture_output=True, text=True, check=False)
    return {
        "command": "make bench" if size is FULL else "make bench QUICK=1",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpus": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "wrk": wrk.stdout.split(" [")[0],
        "size": size.__dict__
        | {"connections": load.CONNECTIONS, "post_connections": load.POST_CONNECTIONS},
        "versions": testbed.versions(),
        "peer": describe_peer(peer) if peer else {},
        "ramp": {
            "query_ms": QUERY_SECONDS * 1000,
            "max_in_flight": MAX_IN_FLIGHT,
            "patience_s": PATIENCE_SECONDS,
        },
        "pool_size": POOL_SIZE,
    }


def describe_peer(peer: Peer) -> Figures:
    """Return package, pin and versions of each variant of the peer."""
    return {
        name: {"package": f"{PACKAGE} {VERSION}", "pin": PINS[name], "versions": versions(python)}
        for name, python in peer.pythons.items()
    }


def find_peer(testbed: Testbed, size: Size) -> Peer | None:
    """Install the peer if `BENCH_PEER` is 1, the default of a full run; return None otherwise."""
    default = "0" if size is QUICK else "1"
    if os.environ.get("BENCH_PEER", default) != "1":
        print_progress(f"{PACKAGE}: skipped; set BENCH_PEER=1 to measure it")
        return None
    try:
        peer = Peer(testbed)
    except BenchError as error:
        print_progress(f"{PACKAGE}: skipped, cannot install it: {error}")
        return None
    print_progress(f"{PACKAGE} {VERSION}: generated and installed")
    return peer


def measure(testbed: Testbed, size: Size) -> Figures:
    """Measure everything."""
    peer = find_peer(testbed, size)
    payment = testbed.new_payment()
    return {
        "machine": machine(testbed, peer, size),
        "small": measure_small(testbed, peer, size),
        "traces": measure_traces(testbed, size),
        # Before others store payments: a new consumer group has all pending ones published again.
        "consumer": measure_consumer(testbed, size),
        "query": measure_query(testbed, payment, size),
        "post": measure_post(testbed, size),
        "instructions": measure_instructions(testbed, peer),
        "idle": measure_idle(testbed, peer, size),
        "workers": measure_workers(testbed, payment, size),
        "ramp": measure_ramp(testbed, payment, size),
    }


def interrupt(number: int, _: FrameType | None) -> NoReturn:
    """Stop the run in order; ignore further signals while the servers stop."""
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    raise BenchError(f"interrupted by {signal.Signals(number).name}")


@contextlib.contextmanager
def prepare_run() -> Iterator[Path]:
    """Raise the limit of open files, handle signals, and yield a temporary directory."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = min(hard_limit, MAX_OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


def main() -> None:
    """Measure and report; on an error, print one line and exit with code 1."""
    is_quick = os.environ.get("QUICK", "0") not in {"", "0"}
    size = QUICK if is_quick else FULL
    try:
        load.require_wrk()
        with prepare_run() as directory, open_testbed(directory) as testbed:
            print_progress(f"generated and installed on {python()}")
            figures = measure(testbed, size)
        target = Path(tempfile.mkdtemp(prefix="bench-results-")) if is_quick else HERE
        report.write(figures, target, None if is_quick else ROOT / "README.md")
    except (BenchError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"benchmark failed: {error}")
    print_progress(f"results are in {os.path.relpath(target)}")


if __name__ == "__main__":
    main()
