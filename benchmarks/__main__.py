"""Measure the generated service: `make bench`, or `make bench QUICK=1` for one short round of everything.

All that is compared is measured in one run and in alternating rounds, of which the first is not counted: a machine that
slows down then slows all of them down. Results go to `benchmarks/` and into README.md; those of a quick run to a
temporary folder.
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

from benchmarks import BenchError, load, report
from benchmarks.peer import PACKAGE, PINS, VERSION, Peer
from benchmarks.servers import Server, fetch
from benchmarks.site import POOL_SIZE, Site, open_site, python, versions
from scripts.demo import ROOT

HERE = Path(__file__).parent
STARTED = time.monotonic()
#: Seconds that a client waits before it gives up, in the load ramp.
PATIENCE_SECONDS = 1.0
#: Seconds of each query in the load ramp, so that the pool of the database is what is short, and not CPU.
QUERY_SECONDS = 0.01
#: The in-flight limit of the service in the load ramp: what waits then is answered long before clients give up.
MAX_IN_FLIGHT = 32

Figures = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rounds: int
    warm_up_rounds: int
    seconds: float
    starts: int
    settle_seconds: float
    workers: tuple[int, ...]
    rates: tuple[int, ...]
    ramp_seconds: float


FULL = Size(
    rounds=5,
    warm_up_rounds=1,
    seconds=4,
    starts=3,
    settle_seconds=3,
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
    workers=(1, 2),
    rates=(300, 1500),
    ramp_seconds=1,
)


def say(text: str) -> None:
    """Print a line of progress."""
    sys.stdout.write(f"{time.monotonic() - STARTED:6.1f} s  {text}\n")
    sys.stdout.flush()


def alternate(title: str, servers: dict[str, Server], size: Size) -> Figures:
    """Load each server in turn, several times; return the counted runs of each, and print the medians."""
    runs: dict[str, list[load.Run]] = {name: [] for name in servers}
    rounds = size.warm_up_rounds + size.rounds
    say(f"{title}: {rounds} rounds of {size.seconds:g} s for each of {len(servers)} servers ...")
    for number in range(rounds):
        for name, server in servers.items():
            run = load.measure(server, size.seconds)
            if number >= size.warm_up_rounds:
                runs[name].append(run)
    figures = {}
    for name, server in servers.items():
        figures[name] = {
            key: [run._asdict()[key] for run in runs[name]] for key in load.Run._fields
        }
        cpu, rate, p99 = (median(figures[name][key]) for key in load.Run._fields)
        say(
            f"  {server.name}, {name}: {cpu:.0f} us CPU per request, {rate:,.0f} requests/s, p99 {p99:.1f} ms"
        )
    return figures


def same_answer(first: Server, second: Server) -> None:
    """Raise `BenchError` unless two servers give the same answer."""
    answers = [fetch(server.url) for server in (first, second)]
    if answers[0] != answers[1]:
        raise BenchError(
            f"{first.name} and {second.name} do not do the same: {answers[0]} and {answers[1]}"
        )


def requests(site: Site, payment: str, peer: Peer | None, size: Size) -> tuple[Figures, Figures]:
    """Measure a tiny JSON answer, then one query of Postgres, each on one worker."""
    with contextlib.ExitStack() as stack:
        bare = stack.enter_context(site.bare())
        servers = {"bare": bare, "service": stack.enter_context(site.service())}
        if peer:
            servers |= {pin: stack.enter_context(peer.server(variant=pin)) for pin in PINS}
        for server in servers.values():
            same_answer(bare, server)
        if peer:
            own = "/api/health"
            servers |= {
                f"{pin}_health": stack.enter_context(peer.server(own, variant=pin)) for pin in PINS
            }
        small = alternate("small JSON", servers, size)
    with site.bare("bare_postgres", payment) as bare, site.service(payment) as service:
        same_answer(bare, service)
        query = alternate("one query", {"bare": bare, "service": service}, size)
    return small, query


def starts_and_memory(site: Site, peer: Peer | None, size: Size) -> Figures:
    """Measure the seconds to the first 200, and memory idle: of one worker, and of two with all that is about them."""
    kinds: dict[str, Callable[[int], Server]] = {
        "bare": lambda workers: site.bare(workers=workers),
        "service": lambda workers: site.service("/health/live", workers),
    }
    if peer:
        kinds["peer"] = lambda workers: peer.server("/api/health", workers)
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
        one, two = figures[name]["memory_1"], figures[name]["memory_2"]
        say(
            f"{server.name}: first 200 after {median(figures[name]['start_seconds']):.2f} s, idle worker "
            f"{one['worker_rss_mb']:.0f} MB RSS, two workers {two.get('workers_pss_mb', float('nan')):.0f} MB PSS"
        )
    return figures


def workers(site: Site, payment: str, size: Size) -> Figures:
    """Measure numbers of workers, `2 x CPU + 1` among them, on one query; the pool of each has the same size."""
    numbers = sorted({*size.workers, 2 * (os.cpu_count() or 1) + 1})
    with contextlib.ExitStack() as stack:
        servers = {}
        for number in numbers:
            settings = {"DATABASE_MAX_CONNECTIONS": str((POOL_SIZE + 1) * number)}
            servers[str(number)] = stack.enter_context(site.service(payment, number, **settings))
        return alternate("workers", servers, size)


def ramp(site: Site, payment: str, size: Size) -> Figures:
    """Offer rising load while each query is slow; a server starts anew for each rate, so that none inherits a queue."""
    site.slow_down(QUERY_SECONDS)
    figures: Figures = {"bare": [], "service": []}
    for rate in size.rates:
        service = site.service(payment, MAX_IN_FLIGHT=str(MAX_IN_FLIGHT))
        for name, server in {
            "bare": site.bare("bare_postgres", payment),
            "service": service,
        }.items():
            with server:
                seen = load.ramp_step(
                    server, rate, 2 * PATIENCE_SECONDS, size.ramp_seconds, PATIENCE_SECONDS
                )
            figures[name].append(seen._asdict())
            p99 = "no 200" if seen.p99_ms is None else f"p99 {seen.p99_ms:.0f} ms"
            say(
                f"{rate}/s offered, {server.name}: {seen.answered:.0f}/s answered, {seen.shed:.0f}/s shed, "
                f"{seen.given_up:.0f}/s given up, {p99}"
            )
    return figures


def machine(site: Site, peer: Peer | None, size: Size) -> Figures:
    """Return what the figures depend on."""
    wrk = subprocess.run(["wrk", "-v"], capture_output=True, text=True, check=False).stdout.split(
        " ["
    )[0]
    return {
        "command": "make bench" if size is FULL else "make bench QUICK=1",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpus": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "wrk": wrk,
        "size": size.__dict__ | {"connections": load.CONNECTIONS},
        "versions": site.versions(),
        "peer": {
            name: {
                "package": f"{PACKAGE} {VERSION}",
                "pin": PINS[name],
                "versions": versions(python),
            }
            for name, python in (peer.pythons.items() if peer else ())
        },
        "ramp": {
            "query_ms": QUERY_SECONDS * 1000,
            "max_in_flight": MAX_IN_FLIGHT,
            "patience_s": PATIENCE_SECONDS,
        },
        "pool_size": POOL_SIZE,
    }


def find_peer(site: Site, size: Size) -> Peer | None:
    """Install the peer where `BENCH_PEER` says so, by default in a full run; None if it is left out."""
    if os.environ.get("BENCH_PEER", "0" if size is QUICK else "1") != "1":
        say(f"{PACKAGE}: left out; BENCH_PEER=1 measures it too")
        return None
    try:
        peer = Peer(site)
        say(f"{PACKAGE} {VERSION}: generated and installed")
    except BenchError as error:
        say(f"{PACKAGE}: left out, it cannot be installed: {error}")
        return None
    return peer


def measure(site: Site, size: Size) -> Figures:
    """Measure everything."""
    peer = find_peer(site, size)
    payment = site.new_payment()
    figures: Figures = {"machine": machine(site, peer, size)}
    figures["small"], figures["query"] = requests(site, payment, peer, size)
    figures["idle"] = starts_and_memory(site, peer, size)
    figures["workers"] = workers(site, payment, size)
    figures["ramp"] = ramp(site, payment, size)
    return figures


def interrupted(number: int, _: FrameType | None) -> NoReturn:
    """End the run in order; what ends the servers is not to be interrupted."""
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    raise BenchError(f"interrupted by {signal.Signals(number).name}")


@contextlib.contextmanager
def prepared() -> Iterator[Path]:
    """Allow many connections, and yield a folder for the run that is gone after it."""
    most = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 65536)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def main() -> None:
    """Measure and report; one line and exit code 1 for whatever goes wrong."""
    size = QUICK if os.environ.get("QUICK", "0") not in {"", "0"} else FULL
    try:
        load.require_wrk()
        with prepared() as folder, open_site(folder) as site:
            say(f"baked and installed on {python()}")
            figures = measure(site, size)
        target = HERE if size is FULL else Path(tempfile.mkdtemp(prefix="bench-results-"))
        report.write(figures, target, ROOT / "README.md" if size is FULL else None)
    except (BenchError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"benchmark failed: {error}")
    say(f"results are in {os.path.relpath(target)}")


if __name__ == "__main__":
    main()
