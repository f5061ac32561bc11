"""`make tune`: its advice, its plot, its refusals, and a run over a small grid."""

import os
import re  # conversations
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from scripts.tune import __main__ as tune
from scripts.tune import advice, plot, table
from scripts.tune.point import Point

PROJECT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"


def point(processes: int, concurrency: int, rate: float, p50_ms: float = 70) -> Point:
    return Point(
        processes=processes,
        concurrency=concurrency,
        jobs_per_second=rate,
        p50_ms=p50_ms,
        p95_ms=2 * p50_ms,
        request_p95_seconds=1.25,
        cpus_used=1.5,
        cpu_ms_per_job=20,
        queue=400,
        connections=8,
        memory_mb=150,
        is_complete=True,
    )


#: As measured on two CPUs: 50 ms of waiting, 20 ms of computation.
GRID = [
    point(1, 1, 12),
    point(1, 8, 49, 147),
    point(2, 1, 13),
    point(2, 8, 80, 85),
    point(2, 32, 88, 391),
    point(4, 8, 86, 99),
]


def test_best_point_has_the_fewest_processes_then_jobs_at_once() -> None:
    """Of those that reach 90 % of the highest rate, which is 79.2 jobs/s."""
    assert advice.best_point(GRID) == point(2, 8, 80, 85)
    assert advice.best_point([*GRID, point(1, 16, 79.3)]).processes == 1
    assert advice.best_point([*GRID, point(1, 16, 79.1)]).processes == 2


def test_advice_names_the_settings_the_reason_and_the_workers() -> None:
    text = advice.advise(GRID, cpus=2, jobs_per_second=100)
    assert text.startswith("Best: JOB_PROCESSES=2 JOB_CONCURRENCY=8, with 80.0 jobs/s")
    assert "reach 90 % of the highest rate, 88.0 jobs/s" in text
    assert "takes 70 ms, of which 20 ms are CPU: about 7 at once keep 2 CPUs busy" in text
    assert "a job takes 391 ms with JOB_PROCESSES=2 JOB_CONCURRENCY=32" in text
    # 80 jobs/s, of which two thirds are planned.
    assert "For 100 jobs/s: 2 such workers" in text
    assert "For 110 jobs/s: 3 such workers" in advice.advise(GRID, cpus=2, jobs_per_second=110)


def test_line_of_a_point_has_all_columns_and_a_star_at_the_time_limit() -> None:
    columns = table.HEADER.partition("\n")[0].count("|")
    line = table.line(point(1, 8, 49)._replace(is_complete=False))
    assert line.count("|") == columns
    assert line.startswith("| 1 | 8 | 49.0* | 70 | 140 | 1.2 | 150 % | 20.0 |")


def test_plot_has_a_panel_per_figure_and_a_line_per_number_of_processes() -> None:
    image = ElementTree.fromstring(plot.draw(GRID, advice.best_point(GRID), "5 < 6"))
    texts = [element.text for element in image.iter(f"{SVG}text")]
    for panel in plot.PANELS:
        assert panel.title in texts
    assert {"5 < 6", "1 process", "2 processes", "4 processes", "jobs at once"} <= set(texts)
    lines = list(image.iter(f"{SVG}polyline"))
    # p95 is a second line of each.
    assert len(lines) == 3 * (len(plot.PANELS) + 1)


def test_grid_lines_of_a_plot_are_round_and_above_the_highest_value() -> None:
    for highest, step in ((88, 25), (1, 0.25), (0, 0.01), (441, 150), (1000, 250)):
        assert plot.grid_step(highest) == pytest.approx(step)


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        (
            {"ENVIRONMENT": "production"},
            "ENVIRONMENT=production: jobs are done for real; unset it on your own machine",
        ),
        ({"RATE": "many"}, "RATE=many: must be a number of jobs per second, for example RATE=200"),
        ({"RATE": "-1"}, "RATE=-1: must be a number of jobs per second, for example RATE=200"),
    ],
)
def test_refused_run_ends_with_one_line(variables: dict[str, str], problem: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.tune"],
        cwd=PROJECT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"tune: {problem}\n")


# conversations: begin
def test_small_grid_is_measured_on_servers_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Two points of the quick grid, with fewer requests."""
    unreachable = "postgresql://nobody@127.0.0.1:9/none"
    monkeypatch.setenv("DATABASE_URL", unreachable)
    monkeypatch.setenv("DEV_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(tune, "choose_recipe", small_recipe)
    tune.main()
    lines = capsys.readouterr().out.splitlines()
    points = [line for line in lines if re.match(r"\| \d", line)]
    assert [line.split(" | ")[:2] for line in points] == [["| 1", "2"], ["| 2", "4"]]
    assert any(line.startswith("Best: JOB_PROCESSES=") for line in lines)
    image = ElementTree.fromstring((tmp_path / "tune.svg").read_text())
    assert image.tag == f"{SVG}svg"


def small_recipe(cpus: int, *, is_quick: bool) -> tune.Recipe:
    assert cpus >= 1
    assert not is_quick
    return tune.Recipe(users=5, requests=20, points=[(1, 2), (2, 4)])


# conversations: end
def test_quick_grid_is_a_part_of_the_whole_one() -> None:
    for cpus in (1, 2, 8):
        quick = tune.choose_recipe(cpus, is_quick=True)
        assert len(set(quick.points)) == 4
        assert len(set(tune.choose_recipe(cpus, is_quick=False).points)) >= 12
