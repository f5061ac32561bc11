"""A request of the service needs fewer instructions than one of bare FastAPI.

Counts do not depend on the load of the machine, so that CI can require their ratio. The figures
and the method are in benchmarks/results.md.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import instructions
from benchmarks.testbed import start_services
from tests.conftest import SERVICE_BIN, bake_to, missing

#: Enough for a count that differs by less than 1 % from that of 600.
REQUESTS = 60
#: Bounds of ratios: measured were 0.59, 0.54, 0.88 and 0.99.
SMALL = 0.62
QUERY = 0.57
PLAIN_QUERY = 0.91
LAST_ROUTE = 1.3
#: Its baseline has neither a rate limit nor an access line. Measured was 1.21.
POST = 1.25
Counts = dict[str, dict[str, float]]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def counts(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Counts]:
    """The instructions of bare FastAPI and of the service, in the environment of the tests."""
    if not shutil.which("valgrind"):
        missing("valgrind")
    directory = tmp_path_factory.mktemp("instructions")
    project = bake_to(template, directory)
    with start_services(directory, project, SERVICE_BIN / "python") as testbed:
        yield instructions.measure(instructions.targets(testbed), directory / "apps", REQUESTS)


def ratio(counts: Counts, route: str) -> float:
    """Return the service's instructions divided by those of bare FastAPI."""
    return counts["service"][route] / counts["bare"][route]


def test_small_json_needs_fewer_instructions_than_bare_fastapi(counts: Counts) -> None:
    assert ratio(counts, "small") <= SMALL


def test_query_needs_fewer_instructions_than_bare_fastapi(counts: Counts) -> None:
    assert ratio(counts, "query") <= QUERY


def test_query_by_a_route_of_fastapi_needs_fewer_too(counts: Counts) -> None:
    assert counts["service"]["plain"] / counts["bare"]["query"] <= PLAIN_QUERY


def test_post_with_all_limits_needs_little_more_than_bare_fastapi(counts: Counts) -> None:
    assert ratio(counts, "post") <= POST


def test_last_of_100_routes_costs_little_more_than_the_first(counts: Counts) -> None:
    routes = counts["service"]
    assert routes["last_route"] <= LAST_ROUTE * routes["first_route"]
