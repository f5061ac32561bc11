"""The consumer of payments: events per second of CPU, and its share of the possible rate.

No consumer settles more than `CONCURRENCY / latency` events a second. The gateway responds at once,
where the CPU is the limit, or after `LATENCY_SECONDS`, where the concurrency is.
"""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from statistics import median

from benchmarks import BenchError
from benchmarks.servers import Server, environment
from benchmarks.testbed import Testbed
from scripts.ports import free_port

CONCURRENCY = 8
LATENCY_SECONDS = 0.05
#: The latency of the gateway, by the name of the figures.
LATENCIES = {"at_once": 0.0, "slow": LATENCY_SECONDS}
#: CPU time is counted in hundredths of a second, so a run needs this many events.
EVENTS = {"at_once": 2000, "slow": 400}

Figures = dict[str, dict[str, list[float]]]


@contextlib.contextmanager
def run_gateway(testbed: Testbed, seconds: float) -> Iterator[int]:
    """Run a gateway during the block; yield its port."""
    port = free_port()
    command = [str(testbed.python), "card_gateway.py", str(port), str(seconds)]
    with subprocess.Popen(command, cwd=testbed.directory / "apps", env=environment()) as process:
        try:
            yield port
        finally:
            process.kill()


def consumer(testbed: Testbed, prefix: str, gateway: int) -> Server:
    """Return a consumer of the stream of this prefix."""
    port = free_port()
    settings = {
        "ENVIRONMENT": "development",  # which may call the gateway without TLS
        "DATABASE_URL": testbed.database.geturl(),
        "REDIS_URL": testbed.redis.geturl(),
        "REDIS_KEY_PREFIX": prefix,
        "GATEWAY_URL": f"http://127.0.0.1:{gateway}",
        "METRICS_BIND": f"127.0.0.1:{port}",
        "MESSAGE_CONCURRENCY_PER_WORKER": str(CONCURRENCY),
        "LOG_FORMAT": "json",
    }
    command = [str(testbed.python), "-m", "app.payments.consumer"]
    return Server("the consumer", command, testbed.project, port, "/health/ready", settings)


def feed(testbed: Testbed, prefix: str, server: Server, events: int) -> dict[str, float]:
    """Have events handled; return the seconds and the CPU seconds. Raises `BenchError`."""
    arguments = ["-m", "feed_consumer", prefix, str(server.process.pid), str(events)]
    settings = environment(
        DATABASE_URL=testbed.database.geturl(),
        REDIS_URL=testbed.redis.geturl(),
        PYTHONPATH=str(testbed.directory / "apps"),
    )
    done = subprocess.run(
        [testbed.python, *arguments],
        cwd=testbed.project,
        env=settings,
        capture_output=True,
        text=True,
        check=False,
    )
    server.check()
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise BenchError(f"{server.name}: not all events were handled: {lines[-1][:300]}")
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def measure(testbed: Testbed, rounds: int) -> Figures:
    """Measure both gateways in each round, each with a consumer of its own."""
    figures: Figures = {name: {"per_second": [], "cpu_us": []} for name in LATENCIES}
    with contextlib.ExitStack() as stack:
        servers = {}
        for name, seconds in LATENCIES.items():
            gateway = stack.enter_context(run_gateway(testbed, seconds))
            prefix = f"bench-{name.replace('_', '-')}"
            servers[prefix] = stack.enter_context(consumer(testbed, prefix, gateway))
        for name, (prefix, server) in zip(LATENCIES, servers.items(), strict=True):
            feed(testbed, prefix, server, EVENTS[name] // 4)  # the warm-up
        for _ in range(rounds):
            for name, (prefix, server) in zip(LATENCIES, servers.items(), strict=True):
                found = feed(testbed, prefix, server, EVENTS[name])
                figures[name]["per_second"].append(EVENTS[name] / found["seconds"])
                figures[name]["cpu_us"].append(found["cpu_seconds"] / EVENTS[name] * 1e6)
    return figures


def per_cpu_second(figures: Figures) -> float:
    """Return the events per second of CPU while the gateway responds at once."""
    return 1e6 / median(figures["at_once"]["cpu_us"])


def share(figures: Figures) -> float:
    """Return the part of `CONCURRENCY / LATENCY_SECONDS` that is reached."""
    return median(figures["slow"]["per_second"]) / (CONCURRENCY / LATENCY_SECONDS)
