"""Draws Grafana's dashboard of the service, without Grafana, from data that a test has recorded.

    DASHBOARD_DATA=data.json python -m pytest attack/test_alerts.py
    python -m scripts.dashboard_picture data.json docs/dashboard

writes docs/dashboard-light.png and docs/dashboard-dark.png, as large as a projector shows them.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.dashboards import CONTENTS

#: The rows that fit a screen and can still be read.
ROWS = ("Now", "Requests", "Objectives")
WIDTH_INCHES = 16.0
UNIT_INCHES = 0.35
DPI = 100
MAX_SERIES = 6
THEMES = {
    "light": {"back": "#f4f5f5", "panel": "#ffffff", "text": "#24292e", "grid": "#dde0e3"},
    "dark": {"back": "#111217", "panel": "#181b1f", "text": "#d8d9da", "grid": "#2c3235"},
}
COLORS = ("#56a64b", "#e0b400", "#3274d9", "#ff780a", "#e02f44", "#a352cc")
BY_NAME = {"green": "#56a64b", "orange": "#ff780a", "red": "#e02f44"}
SUFFIXES = {"reqps": " req/s", "ops": "/s", "cps": "/s"}

Panel = dict[str, Any]
Series = tuple[str, list[tuple[float, float]]]


def value_text(value: float, unit: str) -> str:
    """Return a value with its unit, short."""
    if math.isnan(value):
        return "no data"
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    if unit == "s":
        return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"
    if unit == "bytes":
        return f"{value / (1 << 20):.0f} MiB"
    return f"{value:.3g}{SUFFIXES.get(unit, '')}"


def legend(target: Panel, labels: dict[str, str]) -> str:
    """Return the legend of a series."""
    text = str(target["legendFormat"]).replace("{" * 2, "{").replace("}" * 2, "}")
    for name, value in labels.items():
        text = text.replace("{" + name + "}", value)
    return "" if text == "__auto" else text


def series_of(panel: Panel, data: dict[str, Any]) -> list[Series]:
    """Return the series of a panel, without values that are not numbers."""
    found: list[Series] = []
    for target in panel["targets"]:
        for one in data.get(target["expr"], ()):
            points = [(float(at), float(value)) for at, value in one["values"]]
            points = [point for point in points if math.isfinite(point[1])]
            if points:
                found.append((legend(target, one["metric"]), points))
    return found


def draw_stat(axes: Axes, panel: Panel, found: list[Series]) -> None:
    """Draw one number in the color of its value."""
    value = found[0][1][-1][1] if found else math.nan
    defaults = panel["fieldConfig"]["defaults"]
    steps = defaults["thresholds"]["steps"]
    reached = [step for step in steps if step["value"] is None or value >= step["value"]]
    text = value_text(value, defaults["unit"])
    color = BY_NAME[reached[-1]["color"]]
    axes.text(0.5, 0.45, text, color=color, size=22, ha="center", va="center", weight="bold")
    axes.set_xticks([])
    axes.set_yticks([])


def draw_heatmap(axes: Axes, found: list[Series]) -> None:
    """Draw the share of each bucket as a bar: the buckets of a histogram add up."""
    rows = sorted(found, key=lambda one: float(one[0].replace("+Inf", "inf")))
    totals = [sum(value for _, value in points) for _, points in rows]
    counts = [max(total - before, 0) for total, before in zip(totals, [0, *totals], strict=False)]
    axes.barh(range(len(rows)), counts, color=COLORS[2])
    # Of 15 labels, each second one has room.
    axes.set_yticks(range(0, len(rows), 2), [f"{name} s" for name, _ in rows[::2]])
    axes.set_xscale("log")
    axes.set_xticks([])
    axes.minorticks_off()


def draw_lines(axes: Axes, panel: Panel, found: list[Series], theme: dict[str, str]) -> None:
    """Draw series over time, stacked if the panel is."""
    defaults = panel["fieldConfig"]["defaults"]
    shown = found[:MAX_SERIES]
    if defaults["custom"].get("stacking", {}).get("mode") == "normal":
        times = sorted({at for _, points in shown for at, _ in points})
        values = [[dict(points).get(at, 0.0) for at in times] for _, points in shown]
        names = [name for name, _ in shown]
        axes.stackplot(times, values, labels=names, colors=COLORS, alpha=0.75)
    else:
        for (name, points), color in zip(shown, COLORS, strict=False):
            axes.plot(*zip(*points, strict=True), label=name, color=color, linewidth=1.6)
    axes.set_ylim(bottom=0, top=defaults.get("max"))
    if "thresholdsStyle" in defaults["custom"]:
        for step in defaults["thresholds"]["steps"][1:]:
            if step["value"] <= axes.get_ylim()[1]:
                axes.axhline(step["value"], color=BY_NAME["orange"], linewidth=1, linestyle="--")
    axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(4))  # type: ignore[attr-defined]
    axes.yaxis.set_major_formatter(lambda value, _: value_text(value, defaults["unit"]))
    axes.set_xticks([])
    if any(name for name, _ in shown):
        draw_legend(axes, panel, theme)


def draw_legend(axes: Axes, panel: Panel, theme: dict[str, str]) -> None:
    """Draw the names below the panel, where they cover no line, in columns that its width has."""
    place = {"loc": "upper left", "bbox_to_anchor": (-0.01, -0.02), "borderpad": 0.1}
    for columns in (4, 3, 2) if panel["gridPos"]["w"] > 8 else (3, 2):
        drawn = axes.legend(
            **place,
            fontsize=9,
            ncols=columns,
            frameon=False,
            labelcolor=theme["text"],
            handlelength=1,
            columnspacing=1,
            labelspacing=0.3,
        )
        if drawn.get_window_extent().x1 <= axes.get_window_extent().x1:
            return


def draw(axes: Axes, panel: Panel, data: dict[str, Any], theme: dict[str, str]) -> None:
    """Draw a panel."""
    axes.set_facecolor(theme["panel"])
    axes.set_title(panel["title"], color=theme["text"], fontsize=12, loc="left", weight="bold")
    axes.tick_params(colors=theme["text"], labelsize=9, length=2)
    for side in axes.spines.values():
        side.set_color(theme["grid"])
    found = series_of(panel, data)
    if panel["type"] == "stat":
        draw_stat(axes, panel, found)
        return
    axes.grid(color=theme["grid"], linewidth=0.6)
    axes.set_axisbelow(True)
    if panel["type"] == "heatmap":
        draw_heatmap(axes, found)
    else:
        draw_lines(axes, panel, found, theme)


def chosen_panels() -> list[Panel]:
    """Return the panels of `ROWS`."""
    found: list[Panel] = []
    is_chosen = False
    for panel in CONTENTS["service"]["panels"]:
        if panel["type"] == "row":
            is_chosen = panel["title"] in ROWS
        if is_chosen:
            found.append(panel)
    return found


def picture(data: dict[str, Any], theme: dict[str, str]) -> Figure:
    """Return the picture in a theme."""
    panels = chosen_panels()
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = Figure(figsize=(WIDTH_INCHES, height * UNIT_INCHES), facecolor=theme["back"])
    for panel in panels:
        place = panel["gridPos"]
        left = place["x"] / 24
        bottom = 1 - (place["y"] + place["h"]) / height
        if panel["type"] == "row":
            position = (left + 0.008, bottom + 0.3 / height)
            figure.text(*position, panel["title"], color=theme["text"], size=14, weight="bold")
            continue
        margin = 0.008 if panel["type"] == "stat" else 0.046
        below = 0.3 if panel["type"] == "stat" else 1.8
        size = (place["w"] / 24 - margin - 0.008, (place["h"] - 1.2 - below) / height)
        axes = figure.add_axes((left + margin, bottom + below / height, *size))
        draw(axes, panel, data, theme)
    return figure


def main() -> None:
    """Write both pictures."""
    data = json.loads(Path(sys.argv[1]).read_text())
    for name, theme in THEMES.items():
        figure = picture(data, theme)
        figure.savefig(f"{sys.argv[2]}-{name}.png", dpi=DPI, facecolor=theme["back"])


if __name__ == "__main__":
    main()
