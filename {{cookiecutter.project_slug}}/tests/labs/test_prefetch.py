"""The figures and the picture of the lab of prefetch. The template's tests run the lab itself."""

from xml.etree import ElementTree

from labs.prefetch import CONCURRENCY, PROCESSES, Message, Point, draw, messages_for, most_at_once


def point(processes: int, concurrency: int) -> Point:
    """Return a point whose messages take 0.1 s, `concurrency` at once."""
    starts = [number // concurrency * 0.1 for number in range(64)]
    return Point(processes, concurrency, [Message(start, start, start + 0.1) for start in starts])


def test_overlapping_messages_are_counted() -> None:
    assert most_at_once([(0, 1), (1, 2), (2, 3)]) == 1
    assert most_at_once([(0, 3), (1, 2), (2, 3)]) == 2
    assert point(1, 8).most_handled == 8


def test_rate_and_duration_are_those_of_the_messages() -> None:
    assert round(point(1, 8).jobs_per_second) == 80
    assert round(point(1, 8).p50_ms) == 100


def test_places_limit_the_messages_of_a_point_before_the_cpus_do() -> None:
    assert messages_for(4, 1) < messages_for(1, 8) <= messages_for(4, 32)


def test_every_point_is_in_the_picture() -> None:
    points = [point(each, concurrency) for each in PROCESSES for concurrency in CONCURRENCY]
    picture = draw(point(1, 1), points, points[4])
    ElementTree.fromstring(picture.svg())
    assert picture.svg().count(">80<") == len(PROCESSES)
