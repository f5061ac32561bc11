"""What a run leaves: results.json (every figure), results.md (the tables), the plot, and the block in README.md."""

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import plot

Figures = dict[str, Any]
NAMES = {"bare": "bare FastAPI", "service": "this template"}
NOTHING = "–"  # noqa: RUF001 - a dash, as in any table
BLOCK = re.compile(r"(?<=<!-- bench: begin -->\n).*?(?=<!-- bench: end -->)", re.DOTALL)


def mid(runs: dict[str, list[float]] | None, key: str) -> float | None:
    """Return the median of one figure over all rounds, None where it was not measured."""
    return median(runs[key]) if runs else None


def shown(value: float | None, digits: int = 0, unit: str = "") -> str:
    """Return a number for people."""
    return NOTHING if value is None else f"{value:,.{digits}f}{unit and ' ' + unit}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown; all columns but the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def efficiency(figures: Figures, part: str, name: str) -> float | None:
    """Return bare FastAPI's CPU per request by that of another: 1.0 is parity, 0.5 is twice the CPU."""
    bare, other = (mid(figures[part].get(key), "cpu_us") for key in ("bare", name))
    return bare / other if bare and other else None


def summary(figures: Figures) -> str:
    """Return the table that README.md shows."""
    peers = figures["machine"]["peer"]
    names = NAMES | ({"peer": peers["peer"]["package"]} if peers else {})
    rows = []
    for part, title in {"small": "small JSON", "query": "one Postgres query"}.items():
        runs = [figures[part].get(name) for name in names]
        rows += [
            [f"{title}: CPU per request", *(shown(mid(run, "cpu_us"), 0, "µs") for run in runs)],
            [
                f"{title}: efficiency, bare = 1",
                *(shown(efficiency(figures, part, name), 2) for name in names),
            ],
            [
                f"{title}: requests/s, one worker",
                *(shown(mid(run, "requests_per_second")) for run in runs),
            ],
            [f"{title}: p99", *(shown(mid(run, "p99_ms"), 1, "ms") for run in runs)],
        ]
    idle = [figures["idle"][name] for name in names]
    two = [of["memory_2"] for of in idle]
    rows += [
        ["idle worker, RSS", *(shown(of["memory_1"]["worker_rss_mb"], 0, "MB") for of in idle)],
        [
            "idle worker, PSS",
            *(shown(of["memory_1"].get("workers_pss_mb"), 0, "MB") for of in idle),
        ],
        ["two idle workers, PSS", *(shown(of.get("workers_pss_mb"), 0, "MB") for of in two)],
        ["their master, PSS", *(shown(of.get("master_pss_mb"), 0, "MB") for of in two)],
        [
            "their metrics process, PSS",
            *(shown(of.get("metrics_pss_mb") or None, 0, "MB") for of in two),
        ],
        ["start to the first 200", *(shown(median(of["start_seconds"]), 2, "s") for of in idle)],
    ]
    return table(["", *names.values()], rows)


def workers(figures: Figures) -> str:
    """Return the table of numbers of workers."""
    one = mid(figures["workers"]["1"], "requests_per_second") or 1.0
    rows = []
    for number, runs in figures["workers"].items():
        rate = mid(runs, "requests_per_second") or 0.0
        name = (
            f"{number} (2 x CPU + 1)"
            if int(number) == 2 * figures["machine"]["cpus"] + 1
            else number
        )
        rows.append([name, shown(rate), shown(rate / one, 2), shown(mid(runs, "p99_ms"), 0, "ms")])
    return table(["workers", "requests/s", "relative", "p99"], rows)


def ramp(figures: Figures) -> str:
    """Return the table of the load ramp."""
    columns = {
        "200s/s": "answered",
        "503s/s": "shed",
        "given up/s": "given_up",
        "p99 of 200s": "p99_ms",
    }
    columns["p99 of all"] = "p99_of_all_ms"
    rows = []
    for steps in zip(figures["ramp"]["bare"], figures["ramp"]["service"], strict=True):
        for name, step in zip(NAMES.values(), steps, strict=True):
            cells = (
                shown(step[key], 0, "ms" if key.endswith("ms") else "") for key in columns.values()
            )
            rows.append([f"{step['offered']:,}/s to {name}", *cells])
    return table(["offered", *columns], rows)


def peer(figures: Figures) -> str:
    """Return the table of the peer, by what makes it answer and by route; nothing if it was left out."""
    small, rows = figures["small"], []
    service = mid(small["service"], "cpu_us") or 1.0
    for name, about in figures["machine"]["peer"].items():
        for key, route in {
            name: "the same handler, added",
            f"{name}_health": "its own health check (`def`)",
        }.items():
            cpu = mid(small[key], "cpu_us") or 0.0
            pin = f"`{about['pin']}`, FastAPI {about['versions']['fastapi']}"
            rows.append([f"{route}; {pin}", shown(cpu, 0, "µs"), shown(cpu / service, 2)])
    return table(
        [figures["machine"]["peer"]["peer"]["package"], "CPU per request", "times this template"],
        rows,
    )


def versions(about: dict[str, str]) -> str:
    """Return versions in one line."""
    return ", ".join(f"{name} {version}" for name, version in about.items())


def document(figures: Figures) -> str:
    """Return results.md."""
    machine = figures["machine"]
    size, limits = machine["size"], machine["ramp"]
    parts = [
        "# Results\n\n",
        f"By `{machine['command']}` on {machine['date']}: {machine['cpus']} CPUs, {machine['memory_gb']} GB, "
        f"{machine['wrk']} with {size['connections']} connections, {size['seconds']:g} s for each in "
        f"turn, {size['rounds']} times after {size['warm_up_rounds']} not counted, medians. "
        "Clients and Postgres run on the same CPUs. Compare figures of one run only.\n\n",
        f"Of bare FastAPI and the service: {versions(machine['versions'])}.\n\n",
        "![CPU, workers and overload](results.svg)\n\n## Beside bare FastAPI\n\n",
        summary(figures),
        "\nCPU is user and system time of all processes of a server, those that ended included. Bare is FastAPI on the "
        "stock gunicorn and uvicorn worker, without access log or metrics, with the same answer and a pool of the same "
        f"size ({machine['pool_size']}). The service has its defaults: JSON access lines into a pipe that is read, "
        "metrics, request IDs, all limits, recycling of workers. RSS counts what processes share once for each of "
        "them, PSS once in all.\n\n",
    ]
    if machine["peer"]:
        parts += [
            "## The most used peer\n\n",
            peer(figures),
            "\nGenerated at run time with Postgres, Redis, Prometheus and gunicorn, run by its own command with one "
            "worker and its access log. As its own ranges resolve, its metrics package fails with the FastAPI that it "
            "gets, and every API route answers 500. So one version is pinned: that package from above the range, with "
            "all that the two share held at the service's versions; or an older FastAPI from within it. \"The same "
            'handler": the route of bare FastAPI and the service was added to it, since its own health check is a '
            "plain `def` and pays for a thread. The table above has the first line.\n\n",
            *(
                f"- `{about['pin']}`: {versions(about['versions'])}\n"
                for about in machine["peer"].values()
            ),
            "\n",
        ]
    parts += [
        "## Workers\n\nThe service on one query of Postgres; each worker with a pool of the same size.\n\n",
        workers(figures),
        "\n## Overload\n\n",
        f"Requests come at a fixed rate, answered or not, while each query takes {limits['query_ms']:g} ms, so that "
        f"the pool of {machine['pool_size']} connections is what is short. A client gives up after "
        f"{limits['patience_s']:g} s and hangs up. The service has `MAX_IN_FLIGHT={limits['max_in_flight']}`. "
        'Each rate starts with a fresh server; what comes in the first two seconds is not counted. "All" are 200s, '
        "503s, and those given up, which took the client's patience. The few that bare FastAPI still answers in time "
        "are those that found a connection just given back.\n\n",
        ramp(figures),
    ]
    return "".join(parts)


def block(figures: Figures) -> str:
    """Return what stands in README.md between its markers."""
    machine = figures["machine"]
    about = machine["versions"]
    return (
        "![CPU, workers and overload](benchmarks/results.svg)\n\n"
        f"{summary(figures)}\n"
        f"Measured on {machine['date']} with {machine['cpus']} CPUs, Python {about['python']}, "
        f"FastAPI {about['fastapi']}, gunicorn {about['gunicorn']}, uvicorn {about['uvicorn']}; clients and Postgres "
        "run on the same CPUs. [benchmarks/results.md](benchmarks/results.md) says how, and has the rest: numbers of "
        "workers, overload, and the peer's pins.\n"
    )


def write(figures: Figures, folder: Path, readme: Path | None) -> None:
    """Write all results into a folder, and the block into a README if one is given."""
    (folder / "results.json").write_text(json.dumps(figures, indent=1) + "\n")
    (folder / "results.md").write_text(document(figures))
    plot.draw(figures, folder / "results")
    if readme:
        text = block(figures)
        readme.write_text(BLOCK.sub(lambda _: text, readme.read_text()))
