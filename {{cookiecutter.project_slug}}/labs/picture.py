"""A picture of a lab: the same shapes as SVG, for pages, and as PNG, for slides.

Coordinates are pixels from the upper left corner. The PNG is twice as large.
"""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

# The colors of Okabe and Ito, which color-blind readers can distinguish too.
GOOD = "#0072B2"
BAD = "#D55E00"
GREEN = "#009E73"
PINK = "#CC79A7"
ORANGE = "#E69F00"
SKY = "#56B4E9"
TEXT = "#333333"
GRAY = "#999999"
GRID = "#dddddd"
WHITE = "#ffffff"

#: Pixels of the PNG for each of the SVG.
SCALE = 2
#: Lines and circles of the PNG are drawn larger, then made smaller: that smooths their edges.
SMOOTH = 2
GRID_LINES = 4
#: The distances of grid lines, times a power of ten.
ROUND = (1, 1.5, 2, 2.5, 3, 4, 5, 7.5)
Point = tuple[float, float]


class Line(NamedTuple):
    """A line through points."""

    points: Sequence[Point]
    color: str
    width: float
    is_dashed: bool

    def svg(self) -> str:
        """Return the element."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in self.points)
        dash = ' stroke-dasharray="6 4"' if self.is_dashed else ""
        style = f'fill="none" stroke="{self.color}" stroke-width="{self.width:g}"{dash}'
        return f'<polyline points="{path}" {style}/>'

    def paint(self, draw: ImageDraw.ImageDraw, scale: float) -> None:
        """Draw it on the PNG."""
        width = max(1, round(self.width * scale))
        for part in self._dashes() if self.is_dashed else [self.points]:
            draw.line([(x * scale, y * scale) for x, y in part], self.color, width, "curve")

    def _dashes(self) -> Iterator[list[Point]]:
        """Yield each dash. A dash of 6 pixels begins again at each point."""
        for (x, y), (next_x, next_y) in zip(self.points, self.points[1:], strict=False):
            length = ((next_x - x) ** 2 + (next_y - y) ** 2) ** 0.5
            for number in range(int(length / 10) + 1):
                ends = [min(1, (number * 10 + offset) / (length or 1)) for offset in (0, 6)]
                yield [(x + (next_x - x) * end, y + (next_y - y) * end) for end in ends]


class Box(NamedTuple):
    """A filled rectangle."""

    x: float
    y: float
    width: float
    height: float
    color: str

    def svg(self) -> str:
        """Return the element."""
        size = f'width="{self.width:.1f}" height="{self.height:.1f}"'
        return f'<rect x="{self.x:.1f}" y="{self.y:.1f}" {size} fill="{self.color}"/>'

    def paint(self, draw: ImageDraw.ImageDraw, scale: float) -> None:
        """Draw it on the PNG, which includes the last pixel of a rectangle."""
        right = (self.x + self.width) * scale - 1
        bottom = (self.y + self.height) * scale - 1
        left = self.x * scale
        top = self.y * scale
        if right >= left and bottom >= top:
            draw.rectangle((left, top, right, bottom), self.color)


class Dot(NamedTuple):
    """A filled circle."""

    x: float
    y: float
    radius: float
    color: str

    def svg(self) -> str:
        """Return the element."""
        return (
            f'<circle cx="{self.x:.1f}" cy="{self.y:.1f}" r="{self.radius}" fill="{self.color}"/>'
        )

    def paint(self, draw: ImageDraw.ImageDraw, scale: float) -> None:
        """Draw it on the PNG."""
        draw.circle((self.x * scale, self.y * scale), self.radius * scale, self.color)


class Label(NamedTuple):
    """One line of text; `y` is its baseline, `anchor` is start, middle or end."""

    x: float
    y: float
    text: str
    size: int
    is_bold: bool
    anchor: str
    color: str

    def svg(self) -> str:
        """Return the element."""
        weight = ' font-weight="bold"' if self.is_bold else ""
        place = f'x="{self.x:.1f}" y="{self.y:.1f}" text-anchor="{self.anchor}"'
        style = f'font-size="{self.size}" fill="{self.color}"{weight}'
        return f"<text {place} {style}>{escape(self.text)}</text>"

    def paint(self, draw: ImageDraw.ImageDraw, scale: float) -> None:
        """Draw it on the PNG in Pillow's own font, which does not depend on the machine's."""
        font = ImageFont.load_default(self.size * scale * 0.95)
        anchor = {"start": "ls", "middle": "ms", "end": "rs"}[self.anchor]
        stroke = scale * self.size / 45 if self.is_bold else 0
        place = (self.x * scale, self.y * scale)
        draw.text(place, self.text, self.color, font, anchor=anchor, stroke_width=stroke)


class Picture:
    """Shapes, from back to front."""

    def __init__(self, width: int, height: int, title: str = "") -> None:
        """A white picture with its title at the top, in the first 40 pixels."""
        self.width = width
        self.height = height
        self.shapes: list[Line | Box | Dot | Label] = []
        self.box(0, 0, width, height, WHITE)
        if title:
            self.text(16, 28, title, size=18, is_bold=True)

    def line(
        self, points: Sequence[Point], color: str, width: float = 2, *, is_dashed: bool = False
    ) -> None:
        """Draw a line through points."""
        self.shapes.append(Line(points, color, width, is_dashed))

    def box(self, x: float, y: float, width: float, height: float, color: str) -> None:
        """Draw a filled rectangle."""
        self.shapes.append(Box(x, y, width, height, color))

    def dot(self, x: float, y: float, radius: float, color: str) -> None:
        """Draw a filled circle."""
        self.shapes.append(Dot(x, y, radius, color))

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 13,
        is_bold: bool = False,
        anchor: str = "start",
        color: str = TEXT,
    ) -> None:
        """Write one line; `y` is its baseline, `anchor` is start, middle or end."""
        self.shapes.append(Label(x, y, text, size, is_bold, anchor, color))

    def legend(self, x: float, y: float, entries: Sequence[tuple[str, str]]) -> None:
        """Write colors and their labels in one line."""
        for color, label in entries:
            self.box(x, y - 10, 12, 12, color)
            self.text(x + 18, y, label)
            x += 44 + 7 * len(label)

    def svg(self) -> str:
        """Return the picture as SVG."""
        size = f'viewBox="0 0 {self.width} {self.height}"'
        root = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
        return "\n".join([root, *(shape.svg() for shape in self.shapes), "</svg>"]) + "\n"

    def png(self) -> Image.Image:
        """Return the picture as an image."""
        scale = SCALE * SMOOTH
        image = Image.new("RGB", (self.width * scale, self.height * scale), WHITE)
        draw = ImageDraw.Draw(image)
        for shape in self.shapes:
            shape.paint(draw, scale)
        size = (self.width * SCALE, self.height * SCALE)
        return image.resize(size, Image.Resampling.LANCZOS)

    def save(self, path: Path) -> None:
        """Write `path`.svg and `path`.png."""
        path.with_suffix(".svg").write_text(self.svg())
        self.png().save(path.with_suffix(".png"), optimize=True)


class Axes:
    """A panel with a scale from zero in both directions. `x` and `y` give places in the picture."""

    def __init__(
        self,
        picture: Picture,
        area: tuple[float, float, float, float],
        *,
        title: str,
        x_label: str,
        x_end: float,
        y_end: float,
    ) -> None:
        """`area`: left, top, width and height of the plot itself.

        The title is above it. 50 pixels below it and 50 to its left are for figures and labels.
        """
        self.picture = picture
        self.left, self.top, self.width, self.height = area
        self.x_end = x_end
        self.step = grid_step(y_end)
        picture.text(self.left, self.top - 12, title, size=14, is_bold=True)
        self._draw_grid()
        middle = self.left + self.width / 2
        picture.text(middle, self.top + self.height + 36, x_label, anchor="middle")

    def _draw_grid(self) -> None:
        bottom = self.top + self.height
        for number in range(GRID_LINES + 1):
            value = self.step * number
            ends = [(self.left, self.y(value)), (self.left + self.width, self.y(value))]
            self.picture.line(ends, GRID, 1)
            label = f"{value:,.10g}"
            self.picture.text(self.left - 8, self.y(value) + 5, label, anchor="end")
        step = grid_step(self.x_end)
        for number in range(int(self.x_end / step + 1e-9) + 1):
            label = f"{step * number:g}"
            self.picture.text(self.x(step * number), bottom + 18, label, anchor="middle")

    def x(self, value: float) -> float:
        """Return the place of a value of the horizontal axis."""
        return self.left + value / self.x_end * self.width

    def y(self, value: float) -> float:
        """Return the place of a value of the vertical axis."""
        return self.top + (1 - value / (self.step * GRID_LINES)) * self.height

    def line(self, points: Sequence[Point], color: str, width: float = 2.5) -> None:
        """Draw a line through values."""
        self.picture.line([(self.x(x), self.y(y)) for x, y in points], color, width)

    def column(self, start: float, end: float, low: float, high: float, color: str) -> None:
        """Draw a column between two values of each axis."""
        top = self.y(high)
        width = self.x(end) - self.x(start)
        self.picture.box(self.x(start), top, width, self.y(low) - top, color)

    def mark(self, value: float, label: str, row: int = 0, *, is_left: bool = False) -> None:
        """Draw a dashed vertical line with a label at its upper end, on its right or left.

        `row` moves the label down.
        """
        place = self.x(value)
        ends = [(place, self.top), (place, self.top + self.height)]
        self.picture.line(ends, TEXT, 1.5, is_dashed=True)
        y = self.top + 12 + 16 * row
        width = 8 * len(label)
        left = place - 3 - width if is_left else place + 3
        self.picture.box(left, y - 11, width, 14, WHITE)
        x, anchor = (place - 5, "end") if is_left else (place + 5, "start")
        self.picture.text(x, y, label, size=12, anchor=anchor)


def grid_step(highest: float) -> float:
    """Return the distance of the grid lines: a round number."""
    power = 0.001
    while True:
        for factor in ROUND:
            if power * factor * GRID_LINES >= highest:
                return power * factor
        power *= 10


def bars(
    picture: Picture,
    area: tuple[float, float, float, float],
    rows: Sequence[tuple[str, float, str, str]],
) -> None:
    """Draw horizontal bars: label, value, color, and the text at the end of the bar.

    `area`: left, top, width and height; the labels are left of it, the texts right of the bars.
    """
    left, top, width, height = area
    highest = max(value for _, value, _, _ in rows) or 1
    step = height / len(rows)
    for number, (label, value, color, note) in enumerate(rows):
        middle = top + (number + 0.5) * step
        length = max(2, value / highest * width)
        picture.box(left, middle - step * 0.35, length, step * 0.7, color)
        picture.text(left - 8, middle + 5, label, anchor="end")
        picture.text(left + length + 8, middle + 5, note)
