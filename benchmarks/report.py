"""Write the results of a run: results.json, results.md, the plot, and the block in README.md."""

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import consumer, plot

Figures = dict[str, Any]
NAMES = {"bare": "bare FastAPI", "service": "this template"}
NOTHING = "–"  # noqa: RUF001 - a dash, as in any table
BLOCK = re.compile(r"(?<=<!-- bench: begin -->\n).*?(?=<!-- bench: end -->)", re.DOTALL)
RAMP_COLUMNS = {
    "200s/s": "answered",
    "503s/s": "shed",
    "given up/s": "given_up",
    "p99 of 200s": "p99_ms",
    "p99 of all": "p99_of_all_ms",
}


def middle(runs: dict[str, list[float]] | None, key: str) -> float | None:
    """Return the median of one figure over all rounds, None if it was not measured."""
    return median(runs[key]) if runs else None


def shown(value: float | None, digits: int = 0, unit: str = "") -> str:
    """Return a number as the tables show it."""
    if value is None:
        return NOTHING
    return f"{value:,.{digits}f} {unit}".rstrip()


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; all columns but the first are numbers."""
    alignment = ["---", *["---:"] * (len(head) - 1)]
    lines = [head, alignment, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def efficiency(figures: Figures, part: str, name: str) -> float | None:
    """Return bare FastAPI's CPU per request divided by another's: 0.5 is twice the CPU."""
    bare = middle(figures[part].get("bare"), "cpu_us")
    other = middle(figures[part].get(name), "cpu_us")
    return bare / other if bare and other else None


def summary(figures: Figures) -> str:
    """Return the table that README.md shows."""
    peers = figures["machine"]["peer"]
    names = NAMES | ({"peer": peers["peer"]["package"]} if peers else {})
    rows = [
        *load_rows(figures, "small", "small JSON", list(names)),
        *load_rows(figures, "query", "one Postgres query", list(names)),
        *plain_rows(figures, list(names)),
        *load_rows(figures, "post", "POST of a payment", list(names)),
        *route_rows(figures, list(names)),
        *consumer_rows(figures, list(names)),
        *idle_cpu_rows([figures["idle"][name] for name in names]),
        *idle_rows([figures["idle"][name] for name in names]),
    ]
    return table(["", *names.values()], rows)


def load_rows(figures: Figures, part: str, title: str, names: list[str]) -> list[list[str]]:
    """Return the rows of one route under load, none if it was not measured."""
    if part not in figures:
        return []
    runs = [figures[part].get(name) for name in names]
    cpu = [shown(middle(run, "cpu_us"), 0, "µs") for run in runs]
    relative = [shown(efficiency(figures, part, name), 2) for name in names]
    rates = [shown(middle(run, "requests_per_second")) for run in runs]
    p99 = [shown(middle(run, "p99_ms"), 1, "ms") for run in runs]
    return [
        [f"{title}: CPU per request", *cpu],
        [f"{title}: efficiency, bare = 1", *relative],
        *instruction_rows(figures, part, title, names),
        [f"{title}: requests/s, one worker", *rates],
        [f"{title}: p99", *p99],
    ]


def plain_rows(figures: Figures, names: list[str]) -> list[list[str]]:
    """Return the row of the service with FastAPI's own route, none if it was not measured."""
    if "plain" not in figures["query"]:
        return []
    measured = {"bare": 1.0, "service": efficiency(figures, "query", "plain")}
    cells = [shown(measured.get(name), 2) for name in names]
    return [["one Postgres query, without QuickRoute: efficiency", *cells]]


def instruction_rows(figures: Figures, route: str, title: str, names: list[str]) -> list[list[str]]:
    """Return the rows of the instructions of one route, none if they were not counted."""
    if not figures.get("instructions"):
        return []
    counts = [instructions(figures, name, route) for name in names]
    bare = instructions(figures, "bare", route) or 1.0
    relative = [None if count is None else count / bare for count in counts]
    return [
        [f"{title}: instructions per request", *(shown(count, 0, "k") for count in counts)],
        [f"{title}: instructions, bare = 1", *(shown(value, 2) for value in relative)],
    ]


def route_rows(figures: Figures, names: list[str]) -> list[list[str]]:
    """Return the row of an application with many routes."""
    if not figures.get("instructions"):
        return []
    cells = []
    for name in names:
        first = instructions(figures, name, "first_route")
        last = instructions(figures, name, "last_route")
        cells.append(shown(last / first if first and last else None, 2))
    return [["the last of 100 routes: instructions, the first = 1", *cells]]


def consumer_rows(figures: Figures, names: list[str]) -> list[list[str]]:
    """Return the rows of the consumer, which only the service has."""
    if "consumer" not in figures:
        return []
    measured = figures["consumer"]
    found = {
        "consumer: events per second of CPU": shown(consumer.per_cpu_second(measured)),
        "consumer: share of concurrency / latency": f"{100 * consumer.share(measured):.0f} %",
    }
    return [
        [title, *(value if name == "service" else NOTHING for name in names)]
        for title, value in found.items()
    ]


def instructions(figures: Figures, name: str, route: str) -> float | None:
    """Return the instructions of one server's route in thousands, None if it has no such route."""
    count: float | None = figures["instructions"].get(name, {}).get(route)
    return count


def idle_rows(idle: list[Figures]) -> list[list[str]]:
    """Return the rows of memory and start."""
    one = [figures["memory_1"] for figures in idle]
    two = [figures["memory_2"] for figures in idle]
    starts = [median(figures["start_seconds"]) for figures in idle]
    metrics = [memory.get("metrics_pss_mb") or None for memory in two]
    return [
        ["idle worker, RSS", *(megabytes(memory, "worker_rss_mb") for memory in one)],
        ["idle worker, PSS", *(megabytes(memory, "workers_pss_mb") for memory in one)],
        ["two idle workers, PSS", *(megabytes(memory, "workers_pss_mb") for memory in two)],
        ["their master, PSS", *(megabytes(memory, "master_pss_mb") for memory in two)],
        ["their metrics process, PSS", *(shown(value, 0, "MB") for value in metrics)],
        ["start to the first 200", *(shown(seconds, 2, "s") for seconds in starts)],
    ]


def idle_cpu_rows(idle: list[Figures]) -> list[list[str]]:
    """Return the row of the CPU of an idle worker, none if it was not measured."""
    cpu = [figures.get("cpu_ms") for figures in idle]
    if not any(cpu):
        return []
    return [["idle worker, CPU per second", *(shown(each, 1, "ms") for each in cpu)]]


def megabytes(memory: Figures, key: str) -> str:
    """Return one figure of memory as the tables show it."""
    return shown(memory.get(key), 0, "MB")


def traces(figures: Figures) -> str:
    """Return the table of the parts of the requests that are traced."""
    off = middle(figures["traces"]["off"], "cpu_us") or 1.0
    names = {
        "without": "without the code of tracing",
        "off": "off",
        "10": "traced, 10 %",
        "100": "traced, 100 %",
    }
    rows = []
    for key, name in names.items():
        if key not in figures["traces"]:
            continue
        runs = figures["traces"][key]
        cpu = middle(runs, "cpu_us") or 0.0
        rate = shown(middle(runs, "requests_per_second"))
        p99 = shown(middle(runs, "p99_ms"), 1, "ms")
        rows.append([name, shown(cpu, 0, "µs"), shown(cpu / off, 2), rate, p99])
    return table(["traces", "CPU per request", "off = 1", "requests/s", "p99"], rows)


def workers(figures: Figures) -> str:
    """Return the table of numbers of workers."""
    one = middle(figures["workers"]["1"], "requests_per_second") or 1.0
    rule_of_thumb = str(2 * figures["machine"]["cpus"] + 1)
    rows = []
    for number, runs in figures["workers"].items():
        rate = middle(runs, "requests_per_second") or 0.0
        p99 = middle(runs, "p99_ms")
        name = f"{number} (2 x CPU + 1)" if number == rule_of_thumb else number
        rows.append([name, shown(rate), shown(rate / one, 2), shown(p99, 0, "ms")])
    return table(["workers", "requests/s", "relative", "p99"], rows)


def ramp(figures: Figures) -> str:
    """Return the table of the load ramp."""
    rows = []
    for steps in zip(figures["ramp"]["bare"], figures["ramp"]["service"], strict=True):
        for name, step in zip(NAMES.values(), steps, strict=True):
            cells = [
                shown(step[key], 0, "ms" if key.endswith("ms") else "")
                for key in RAMP_COLUMNS.values()
            ]
            rows.append([f"{step['offered']:,}/s to {name}", *cells])
    return table(["offered", *RAMP_COLUMNS], rows)


def peer(figures: Figures) -> str:
    """Return the table of the peer, by pin and by route."""
    small = figures["small"]
    service = middle(small["service"], "cpu_us") or 1.0
    rows = []
    for name, variant in figures["machine"]["peer"].items():
        pin = f"`{variant['pin']}`, FastAPI {variant['versions']['fastapi']}"
        routes = {name: "the same handler, added", f"{name}_health": "its own health check (`def`)"}
        for key, route in routes.items():
            cpu = middle(small[key], "cpu_us") or 0.0
            rows.append([f"{route}; {pin}", shown(cpu, 0, "µs"), shown(cpu / service, 2)])
    package = figures["machine"]["peer"]["peer"]["package"]
    return table([package, "CPU per request", "times this template"], rows)


def versions(found: dict[str, str]) -> str:
    """Return versions as one line."""
    return ", ".join(f"{name} {version}" for name, version in found.items())


def document(figures: Figures) -> str:
    """Return results.md."""
    parts = [introduction(figures), comparison(figures)]
    if figures["machine"]["peer"]:
        parts.append(peer_section(figures))
    if "traces" in figures:
        parts.append(traces_section(figures))
    parts += [workers_section(figures), overload_section(figures)]
    return "\n".join(parts)


def introduction(figures: Figures) -> str:
    """Return the conditions of the run."""
    machine = figures["machine"]
    size = machine["size"]
    return (
        "# Results\n\n"
        f"Measured by `{machine['command']}` on {machine['date']} with {machine['cpus']} CPUs, "
        f"{machine['memory_gb']} GB and {machine['wrk']}. "
        f"wrk uses {size['connections']} connections and loads each server in turn for "
        f"{size['seconds']:g} s. The figures are medians of {size['rounds']} rounds. "
        f"Warm-up rounds, not counted: {size['warm_up_rounds']}. "
        "Clients and Postgres run on the same CPUs. Compare figures of one run only.\n\n"
        f"Versions of bare FastAPI and the service: {versions(machine['versions'])}.\n\n"
        "![CPU, workers and overload](results.svg)\n"
    )


def comparison(figures: Figures) -> str:
    """Return the section that compares with bare FastAPI."""
    pool_size = figures["machine"]["pool_size"]
    return (
        "## Compared with bare FastAPI\n\n"
        f"{summary(figures)}\n"
        "- CPU is user and system time of all processes of a server, including exited ones.\n"
        f"{instructions_note(figures)}"
        f"{consumer_note(figures)}"
        "- Bare FastAPI runs on the stock gunicorn and uvicorn worker, without access log and "
        f"metrics. It returns the same response, and its pool has the same size ({pool_size}).\n"
        "- This template runs with its defaults: JSON access lines into a pipe that "
        "is read, metrics, request IDs, all limits, and recycling of workers.\n"
        "- RSS counts shared memory once for each process, PSS once in total.\n"
    )


def instructions_note(figures: Figures) -> str:
    """Return the lines about what the newer figures are."""
    if not figures.get("instructions"):
        return ""
    connections = figures["machine"]["size"]["post_connections"]
    return (
        "- Instructions are those in user space, in thousands, of one client without sockets "
        "(cachegrind). They differ by less than 1 % from run to run, so CI requires their ratios. "
        "The kernel's are not in them.\n"
        f"- A POST stores a payment with key and event, from {connections} connections. Bare "
        "FastAPI runs the same statement, and has no rate limit and no relay of events.\n"
    )


def consumer_note(figures: Figures) -> str:
    """Return the line about the consumer."""
    if "consumer" not in figures:
        return ""
    milliseconds = consumer.LATENCY_SECONDS * 1000
    return (
        "- The consumer charges and settles payments. Its CPU is that with a gateway that responds "
        f"at once; its share is that of the {consumer.CONCURRENCY / consumer.LATENCY_SECONDS:g} "
        f"events a second that {consumer.CONCURRENCY} charges at once can be, at "
        f"{milliseconds:g} ms each.\n"
    )


def peer_section(figures: Figures) -> str:
    """Return the section about the peer."""
    variants = figures["machine"]["peer"].values()
    pins = "".join(f"- `{each['pin']}`: {versions(each['versions'])}\n" for each in variants)
    return (
        "## The most used template\n\n"
        f"{peer(figures)}\n"
        "It is generated during the run with Postgres, Redis, Prometheus and gunicorn. Its own "
        "command runs it, with one worker and its access log.\n\n"
        "By its own version ranges, its metrics package fails with the FastAPI that is installed, "
        "and every API route returns 500. So one version is pinned, in two variants:\n\n"
        "- its metrics package from above the range, with all shared packages pinned to the "
        "service's versions;\n"
        "- an older FastAPI from within the range.\n\n"
        '"The same handler" is the route of bare FastAPI and of the service, added to the peer. '
        "The peer's own health check is a plain `def`, which costs a thread. The table above "
        "shows the first line.\n\n"
        f"{pins}"
    )


def traces_section(figures: Figures) -> str:
    """Return the section about traces."""
    return (
        "## Traces\n\n"
        "The small JSON response. Spans are sent to a collector that is not counted, by "
        "OpenTelemetry's exporter.\n\n"
        f"{traces(figures)}"
    )


def workers_section(figures: Figures) -> str:
    """Return the section about numbers of workers."""
    return (
        "## Workers\n\n"
        "The service with one Postgres query per request. All workers have pools of the same "
        "size.\n\n"
        f"{workers(figures)}"
    )


def overload_section(figures: Figures) -> str:
    """Return the section about the load ramp."""
    machine = figures["machine"]
    limits = machine["ramp"]
    return (
        "## Overload\n\n"
        "Requests arrive at a fixed rate, whether or not earlier ones have finished. Each query "
        f"takes {limits['query_ms']:g} ms, so that the pool of {machine['pool_size']} connections "
        f"is the bottleneck. A client gives up after {limits['patience_s']:g} s and closes its "
        f"connection. The service has `MAX_IN_FLIGHT={limits['max_in_flight']}`. Each rate starts "
        "with a fresh server, and its first two seconds are not counted.\n\n"
        '"All" means 200s, 503s and the requests that were given up, which count with the '
        "client's patience. Under overload, bare FastAPI serves only the few requests that find "
        "a connection just released.\n\n"
        f"{ramp(figures)}"
    )


def block(figures: Figures) -> str:
    """Return the text between the markers in README.md."""
    machine = figures["machine"]
    found = machine["versions"]
    return (
        f"{summary(figures)}\n"
        f"Measured on {machine['date']} with {machine['cpus']} CPUs, Python {found['python']}, "
        f"FastAPI {found['fastapi']}, gunicorn {found['gunicorn']} and uvicorn "
        f"{found['uvicorn']}. Clients and Postgres run on the same CPUs. "
        "[benchmarks/results.md](benchmarks/results.md) describes the method and has the other "
        "figures: numbers of workers, overload, and all versions.\n"
    )


def write(figures: Figures, directory: Path, readme: Path | None) -> None:
    """Write all results into a directory, and the block into a README if one is given."""
    (directory / "results.json").write_text(json.dumps(figures, indent=1) + "\n")
    (directory / "results.md").write_text(document(figures))
    plot.draw(figures, directory / "results")
    if readme:
        text = block(figures)
        readme.write_text(BLOCK.sub(lambda _: text, readme.read_text()))
