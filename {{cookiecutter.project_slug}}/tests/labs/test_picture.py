"""A picture has the same shapes as SVG and as PNG."""

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image, ImageColor

from labs.picture import BAD, GOOD, SCALE, WHITE, Axes, Picture, bars, grid_step

SVG = "{http://www.w3.org/2000/svg}"


def color_at(image: Image.Image, x: float, y: float) -> object:
    return image.getpixel((int(x * SCALE), int(y * SCALE)))


def elements(picture: Picture, name: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(picture.svg()).findall(f"{SVG}{name}")


@pytest.mark.parametrize(
    "shape",
    [
        lambda picture: picture.box(20, 20, 40, 40, GOOD),
        lambda picture: picture.dot(40, 40, 20, GOOD),
        lambda picture: picture.line([(20, 40), (60, 40)], GOOD, 10),
        lambda picture: picture.line([(20, 40), (60, 40)], GOOD, 10, is_dashed=True),
    ],
    ids=["box", "dot", "line", "dashes"],
)
def test_shape_is_where_it_should_be(shape: Callable[[Picture], None]) -> None:
    picture = Picture(100, 80)
    shape(picture)
    image = picture.png()
    assert image.size == (100 * SCALE, 80 * SCALE)
    assert color_at(image, 42, 40) == ImageColor.getrgb(GOOD)
    assert color_at(image, 10, 40) == ImageColor.getrgb(WHITE)
    assert color_at(image, 70, 40) == ImageColor.getrgb(WHITE)
    assert GOOD in picture.svg()


@pytest.mark.parametrize(("anchor", "left", "right"), [("start", 1, 0), ("end", 0, 1)])
def test_text_begins_or_ends_at_its_place(anchor: str, left: int, right: int) -> None:
    picture = Picture(200, 40)
    picture.text(100, 25, "SIGTERM", anchor=anchor)
    image = picture.png()
    half = image.width // 2
    before = image.crop((0, 0, half - 2, image.height)).getextrema()
    after = image.crop((half + 2, 0, image.width, image.height)).getextrema()
    is_blank = ((255, 255), (255, 255), (255, 255))
    assert (before != is_blank) == bool(right)
    assert (after != is_blank) == bool(left)


def test_text_is_escaped() -> None:
    picture = Picture(100, 40)
    picture.text(0, 20, "p99 < 1 s & <b>")
    (text,) = elements(picture, "text")
    assert text.text == "p99 < 1 s & <b>"


def test_axes_reach_beyond_the_highest_value() -> None:
    picture = Picture(400, 300)
    axes = Axes(picture, (50, 50, 300, 200), title="a", x_label="s", x_end=10, y_end=90)
    assert axes.x(0) == 50
    assert axes.x(10) == 350
    assert axes.y(0) == 250
    assert axes.y(90) >= 50
    axes.column(2, 3, 0, 90, BAD)
    assert color_at(picture.png(), axes.x(2.5), axes.y(45)) == ImageColor.getrgb(BAD)


@pytest.mark.parametrize(
    ("highest", "step"), [(4, 1), (60, 15), (90, 25), (1000, 250), (0.1, 0.025)]
)
def test_grid_has_round_numbers(highest: float, step: float) -> None:
    assert grid_step(highest) == pytest.approx(step)


def test_longest_bar_fills_the_area() -> None:
    picture = Picture(400, 100)
    bars(picture, (100, 0, 200, 100), [("a", 10, GOOD, "10"), ("b", 0, BAD, "0")])
    widths = [float(box.get("width", 0)) for box in elements(picture, "rect")]
    assert widths == [400, 200, 2]


def test_both_files_are_written(tmp_path: Path) -> None:
    Picture(100, 80, "Title").save(tmp_path / "lab")
    assert (tmp_path / "lab.svg").read_text().startswith("<svg ")
    with Image.open(tmp_path / "lab.png") as image:
        assert image.size == (100 * SCALE, 80 * SCALE)
