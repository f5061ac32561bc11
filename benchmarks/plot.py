"""Plot the results: CPU compared with bare FastAPI, numbers of workers, and overload."""

from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# The colors of Okabe and Ito, which color-blind readers can distinguish too.
BARE = "#999999"
SERVICE = "#0072B2"
PEER = "#D55E00"
#: Label and color of each server.
SERVERS = {
    "bare": ("bare FastAPI", BARE),
    "service": ("this template", SERVICE),
    "peer": ("fastapi_template", PEER),
}
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "svg.hashsalt": "results",
    "svg.fonttype": "path",
}


def cpu(axes: Axes, figures: dict[str, Any]) -> None:
    """Draw CPU per request, one bar for each server and route."""
    bars = []
    routes = {"small": "small JSON", "query": "one query", "post": "POST"}
    for part, route in routes.items():
        for name, (label, color) in SERVERS.items():
            if name in figures.get(part, {}):
                bars.append((f"{label}, {route}", median(figures[part][name]["cpu_us"]), color))
    labels, values, colors = zip(*reversed(bars), strict=True)
    drawn = axes.barh(labels, values, color=colors, height=0.7)
    axes.bar_label(drawn, [f"{value:.0f}" for value in values], padding=3)
    axes.set_title("CPU per request, µs")
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(left=False, bottom=False, labelbottom=False)
    axes.margins(x=0.12)


def workers(axes: Axes, figures: dict[str, Any]) -> None:
    """Draw requests per second against the number of workers."""
    numbers = list(figures["workers"])
    rates = [median(runs["requests_per_second"]) for runs in figures["workers"].values()]
    drawn = axes.bar(numbers, rates, color=SERVICE, width=0.6)
    axes.bar_label(drawn, [f"{rate:,.0f}" for rate in rates], padding=2)
    cpus = figures["machine"]["cpus"]
    names = {str(cpus): "\n1 x CPU", str(2 * cpus + 1): "\n2 x CPU + 1"}
    axes.set_xticks(range(len(numbers)), [number + names.get(number, "") for number in numbers])
    axes.set_title(f"Requests/s by workers, {cpus} CPUs")
    axes.margins(y=0.12)
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False, labelleft=False, bottom=False)


def overload(axes: Axes, figures: dict[str, Any], key: str, title: str) -> None:
    """Draw one figure of the load ramp for both servers."""
    for name, label, color in (
        ("bare", "bare FastAPI + asyncpg", BARE),
        ("service", "this template", SERVICE),
    ):
        steps = figures["ramp"][name]
        rates = [step["offered"] for step in steps]
        values = [step[key] for step in steps]
        axes.plot(rates, values, "o-", color=color, label=label, linewidth=2, markersize=4)
    axes.set_title(title)
    axes.set_xlabel("offered requests/s")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.4), handlelength=1.2)


def draw(figures: dict[str, Any], path: Path) -> None:
    """Write the plot as `path`.svg and `path`.png."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 6), layout="constrained", facecolor="white")
        (left, right), (lower_left, lower_right) = figure.subplots(2, 2)
        cpu(left, figures)
        workers(right, figures)
        overload(lower_left, figures, "answered", "Overload: 200s/s")
        overload(lower_right, figures, "p99_of_all_ms", "Overload: p99 to the response, ms")
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.08)  # type: ignore[union-attr, call-arg]
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(path.with_suffix(".png"), dpi=180, metadata={"Software": None})
