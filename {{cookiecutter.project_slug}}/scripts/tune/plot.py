"""The plot of `make tune`: an SVG with a panel for each figure.

Each number of processes has a line.
"""

from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import groupby
from typing import NamedTuple

from scripts.tune.point import Point

# The colors of Okabe and Ito, which color-blind readers can distinguish too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
TEXT = "#333333"
GRID = "#dddddd"
#: The size of a panel, and the place of its axes in it.
WIDTH = 340
HEIGHT = 250
LEFT = 56
RIGHT = 16
TOP = 40
BOTTOM = 44
COLUMNS = 3
#: The space above the panels, for the title and the legend.
HEAD = 62
GRID_LINES = 4
#: The distances of grid lines, times a power of ten.
ROUND = (1, 1.5, 2, 2.5, 3, 4, 5, 7.5)


class Panel(NamedTuple):
    """One figure of all points, and a second one as a dashed line."""

    title: str
    value: Callable[[Point], float]
    second: Callable[[Point], float] | None = None


PANELS = (
    Panel("Jobs per second", lambda point: point.jobs_per_second),
    Panel(
        "Start to end of a job, ms: p50, p95 dashed",
        lambda point: point.p50_ms,
        lambda point: point.p95_ms,
    ),
    Panel("CPU of the worker, % of one CPU", lambda point: point.cpus_used * 100),
    Panel("Memory of the worker, MB", lambda point: point.memory_mb),
    Panel("Most jobs queued", lambda point: point.queue),
    Panel("Most connections of the worker", lambda point: point.connections),
)


def draw(points: Sequence[Point], best: Point, title: str) -> str:
    """Return the plot as SVG. The best point has a ring."""
    rows = -(-len(PANELS) // COLUMNS)
    width = COLUMNS * WIDTH
    height = HEAD + rows * HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(16, 24, title, size=16, weight="bold"),
        *_legend(points, best),
    ]
    for number, panel in enumerate(PANELS):
        x = number % COLUMNS * WIDTH
        y = HEAD + number // COLUMNS * HEIGHT
        parts.append(f'<g transform="translate({x} {y})">')
        parts += _panel(panel, points, best)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def _lines(points: Sequence[Point]) -> list[tuple[int, str, list[Point]]]:
    """Return number of processes, color and points of each line."""
    ordered = sorted(points)
    lines = [(key, list(group)) for key, group in groupby(ordered, lambda each: each.processes)]
    return [
        (processes, COLORS[number % len(COLORS)], line)
        for number, (processes, line) in enumerate(lines)
    ]


def _legend(points: Sequence[Point], best: Point) -> list[str]:
    parts = []
    x = 16
    for processes, color, _ in _lines(points):
        label = f"{processes} process{'' if processes == 1 else 'es'}"
        parts.append(f'<path d="M{x} 44h24" stroke="{color}" stroke-width="2.5"/>')
        parts.append(f'<circle cx="{x + 12}" cy="44" r="4" fill="{color}"/>')
        parts.append(_text(x + 30, 48, label))
        x += 130
    parts.append(_ring(x + 10, 44))
    label = f"the best: {best.processes} x {best.concurrency} at once"
    parts.append(_text(x + 24, 48, label))
    return parts


class _Axes:
    """The axes of a panel: jobs at once from left to right, at equal distances."""

    width = WIDTH - LEFT - RIGHT
    height = HEIGHT - TOP - BOTTOM

    def __init__(self, points: Sequence[Point], highest: float) -> None:
        self.concurrencies = sorted({point.concurrency for point in points})
        self.step = grid_step(highest)

    def x(self, concurrency: int) -> float:
        position = self.concurrencies.index(concurrency) + 0.5
        return LEFT + position / len(self.concurrencies) * self.width

    def y(self, value: float) -> float:
        return TOP + (1 - value / (self.step * GRID_LINES)) * self.height

    def draw(self) -> Iterator[str]:
        for number in range(GRID_LINES + 1):
            value = self.step * number
            y = self.y(value)
            yield f'<path d="M{LEFT} {y:.1f}h{self.width}" stroke="{GRID}"/>'
            yield _text(LEFT - 6, y + 4, f"{value:g}", anchor="end")
        bottom = HEIGHT - BOTTOM
        for concurrency in self.concurrencies:
            yield _text(self.x(concurrency), bottom + 16, str(concurrency), anchor="middle")
        yield _text(LEFT + self.width / 2, bottom + 34, "jobs at once", anchor="middle")


def _panel(panel: Panel, points: Sequence[Point], best: Point) -> Iterator[str]:
    """Yield axes, lines and points of a panel."""
    values = [panel.value, *([panel.second] if panel.second else [])]
    axes = _Axes(points, max(value(point) for value in values for point in points))
    yield _text(LEFT, 20, panel.title, size=13, weight="bold")
    yield from axes.draw()
    lines = _lines(points)
    for number, (_, color, line) in enumerate(lines):
        # The first is the widest, so that lines on top of each other are seen.
        stroke = 2 + 2 * (len(lines) - 1 - number)
        for value in values:
            dash = "" if value is panel.value else ' stroke-dasharray="5 4"'
            places = [(axes.x(point.concurrency), axes.y(value(point))) for point in line]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            style = f'fill="none" stroke="{color}" stroke-width="{stroke}"{dash}'
            yield f'<polyline points="{path}" {style}/>'
            for x, y in places:
                yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{stroke / 2 + 2.5}" fill="{color}"/>'
    yield _ring(axes.x(best.concurrency), axes.y(panel.value(best)))


def grid_step(highest: float) -> float:
    """Return the distance of the grid lines: a round number."""
    power = 0.01
    while True:
        for factor in ROUND:
            if power * factor * GRID_LINES >= highest:
                return power * factor
        power *= 10


def _ring(x: float, y: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8" fill="none" stroke="{TEXT}" stroke-width="2"/>'


def _text(
    x: float, y: float, text: str, *, size: int = 12, weight: str = "normal", anchor: str = "start"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}" fill="{TEXT}">{escape(text)}</text>'
    )
