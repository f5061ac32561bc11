"""Lab 2: one of two instances is replaced under load. Which requests are lost?"""

import asyncio
import functools
import itertools
import os
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from labs.balancer import Balancer, Outcome
from labs.picture import BAD, GOOD, GRAY, GREEN, ORANGE, Axes, Picture
from labs.stage import Instance, Ports, Stage

NUMBER = 2
TITLE = "which worker loses requests at SIGTERM?"
#: Longer than the balancer needs to notice: two probes, and the time limit of one.
DRAIN_SECONDS = "5"
PROBE_SECONDS = "1"
REQUESTS_PER_SECOND = 40
STEADY_SECONDS = 2.0
COLUMN_SECONDS = 0.25


class Replaced(NamedTuple):
    """A replacement as the balancer has seen it. Times are seconds since the start of the load."""

    name: str
    outcomes: list[Outcome]
    changes: list[tuple[float, bool]]
    signaled: float
    exited: float
    ready_again: float
    end: float

    @property
    def last_column(self) -> float:
        """The end of the last whole column of the picture."""
        return int(self.end / COLUMN_SECONDS) * COLUMN_SECONDS

    @property
    def lost(self) -> list[Outcome]:
        """The requests that clients got no response to."""
        return [each for each in self.outcomes if each.is_lost]


def run(stage: Stage) -> None:
    """Replace an instance of both kinds, and compare."""
    stage.say(f"{REQUESTS_PER_SECOND} payments/s to two instances.")
    stage.say("The first one gets SIGTERM, exits, and starts again.\n")
    ports = stage.watch()
    usual_worker = replace(stage, "the usual uvicorn worker", ports, is_usual=True)
    report(stage, usual_worker)
    this_worker = replace(stage, "this template's worker", ports, is_usual=False)
    report(stage, this_worker)
    stage.picture = draw([usual_worker, this_worker])
    sent = len(this_worker.outcomes)
    lost = len(this_worker.lost)
    stage.claims.claim(f"this worker lost {lost} of {sent} requests", lost == 0)
    sent = len(usual_worker.outcomes)
    lost = len(usual_worker.lost)
    stage.claims.control(f"the usual worker lost {lost} of {sent} requests", lost > 0)


def replace(stage: Stage, name: str, ports: Ports, *, is_usual: bool) -> Replaced:
    """Run two instances under load, and replace the first one, which has these ports."""
    start_first = functools.partial(start, stage, is_usual, ports)
    instances = [start_first(), start(stage, is_usual)]
    for instance in instances:
        instance.wait_until_ready()
    return asyncio.run(under_load(name, instances, start_first))


def start(stage: Stage, is_usual: bool, ports: Ports | None = None) -> Instance:
    """Start an instance; the application is the same."""
    if is_usual:
        return stage.serve_usual(ports=ports)
    drain = os.environ.get("DRAIN_SECONDS") or DRAIN_SECONDS
    return stage.serve(ports=ports, DRAIN_SECONDS=drain)


async def under_load(
    name: str, instances: list[Instance], start_first: Callable[[], Instance]
) -> Replaced:
    """Send requests all the time, while the first instance ends and starts again."""
    probe_seconds = float(os.environ.get("PROBE_SECONDS") or PROBE_SECONDS)
    balancer = Balancer([instance.url for instance in instances], probe_seconds)
    first, second = instances
    watch = asyncio.create_task(balancer.watch())
    load = asyncio.create_task(balancer.load(1 / REQUESTS_PER_SECOND, itertools.count()))
    try:
        await asyncio.sleep(STEADY_SECONDS)
        first.send()
        signaled = balancer.now
        await asyncio.to_thread(first.wait)
        exited = balancer.now
        again = start_first()
        await asyncio.to_thread(again.wait_until_ready)
        ready_again = balancer.now
        await asyncio.sleep(STEADY_SECONDS)
    finally:
        load.cancel()
        await asyncio.wait([load])
        watch.cancel()
        await balancer.close()
    end = balancer.now
    for instance in (again, second):
        instance.kill()
    changes = balancer.targets[0].changes
    return Replaced(name, balancer.outcomes, changes, signaled, exited, ready_again, end)


def report(stage: Stage, replaced: Replaced) -> None:
    """Print what happened."""
    lost = replaced.lost
    stage.say(f"{replaced.name}: {len(replaced.outcomes)} requests, {len(lost)} lost")
    rejected = [each for each in replaced.outcomes if each.is_rejected]
    for error, number in Counter(each.error for each in lost).items():
        stage.say(f"    {number} x {error}")
    if rejected:
        stage.say(f"    {len(rejected)} x 503: this machine is busy with something else")
    stage.say(f"    exit {replaced.exited - replaced.signaled:.1f} s after SIGTERM")
    out = [at for at, is_ready in replaced.changes if not is_ready and at > replaced.signaled]
    if out:
        stage.say(f"    the balancer noticed {out[0] - replaced.signaled:.1f} s after SIGTERM")


def draw(runs: list[Replaced]) -> Picture:
    """Draw requests over time: a panel for each kind of worker."""
    picture = Picture(900, 640, "SIGTERM to one of two instances, seen from the balancer")
    entries = [(GOOD, "served"), (BAD, "lost"), (GREEN, "the balancer uses the instance")]
    entries.append((GRAY, "it does not"))
    if any(each.is_rejected for replaced in runs for each in replaced.outcomes):
        entries.append((ORANGE, "503, machine busy"))
    picture.legend(16, 56, entries)
    end = max(each.last_column for each in runs)
    for number, replaced in enumerate(runs):
        title = f"{replaced.name}: {len(replaced.lost)} of {len(replaced.outcomes)} requests lost"
        top = 110 + number * 270
        axes = Axes(
            picture,
            (60, top, 810, 170),
            title=title,
            x_label="seconds",
            x_end=end,
            y_end=1.6 * REQUESTS_PER_SECOND,
        )
        draw_columns(axes, replaced)
        draw_rotation(axes, replaced, top + 174)
        axes.mark(replaced.ready_again, "ready again")
        axes.mark(replaced.exited, "exit", row=1)
        axes.mark(replaced.signaled, "SIGTERM", is_left=True)
    return picture


def draw_columns(axes: Axes, replaced: Replaced) -> None:
    """Draw requests per second, the lost ones on top, for each whole column."""
    columns: dict[int, list[Outcome]] = {}
    whole = [each for each in replaced.outcomes if each.at < replaced.last_column]
    for outcome in whole:
        columns.setdefault(int(outcome.at / COLUMN_SECONDS), []).append(outcome)
    for number, outcomes in columns.items():
        start = number * COLUMN_SECONDS
        end = start + COLUMN_SECONDS * 0.9
        total = len(outcomes) / COLUMN_SECONDS
        lost = sum(each.is_lost for each in outcomes) / COLUMN_SECONDS
        rejected = sum(each.is_rejected for each in outcomes) / COLUMN_SECONDS
        served = total - lost - rejected
        axes.column(start, end, 0, served, GOOD)
        axes.column(start, end, served, served + rejected, ORANGE)
        axes.column(start, end, served + rejected, total, BAD)


def draw_rotation(axes: Axes, replaced: Replaced, top: float) -> None:
    """Draw below the plot when the balancer used the first instance."""
    end = replaced.last_column
    changes = [change for change in replaced.changes if change[0] < end]
    for (at, is_ready), (until, _) in itertools.pairwise([*changes, (end, False)]):
        width = axes.x(until) - axes.x(at)
        axes.picture.box(axes.x(at), top, width, 5, GREEN if is_ready else GRAY)
