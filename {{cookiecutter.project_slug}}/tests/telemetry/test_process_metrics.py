"""The metrics of one process: what it measures of itself, and how often.

Source: README.md, "Metrics".
"""

import asyncio
import random
import time

from prometheus_client import CollectorRegistry, Histogram

from app.telemetry import process_metrics
from app.telemetry.process_metrics import DELAY_BUCKETS, ProcessMetrics, observe_all


def histogram() -> Histogram:
    return Histogram("delay", "", buckets=DELAY_BUCKETS, registry=CollectorRegistry())


def test_many_observations_are_the_same_as_one_after_the_other() -> None:
    """A value at the bound of a bucket belongs to it, one over the last bound to `+Inf`."""
    values = [*DELAY_BUCKETS, 0.0, 1000.0, *(random.expovariate(20) for _ in range(100))]
    at_once = histogram()
    observe_all(at_once, values)
    one_by_one = histogram()
    for value in values:
        one_by_one.observe(value)

    def rounded(histogram: Histogram) -> dict[tuple[str, str], float]:
        (metric,) = histogram.collect()
        samples = [each for each in metric.samples if not each.name.endswith("_created")]
        return {(each.name, str(each.labels)): round(each.value, 6) for each in samples}

    assert rounded(at_once) == rounded(one_by_one)


async def test_each_timer_that_is_late_is_measured() -> None:
    measuring = asyncio.create_task(process_metrics._measure_delays(0.01, 3))
    await asyncio.sleep(0)
    time.sleep(0.2)  # noqa: ASYNC251 - blocks the loop
    delays = await measuring
    assert len(delays) == 3
    assert delays[0] > 0.15
    assert min(delays) >= 0


def test_process_that_computes_is_not_idle() -> None:
    metrics = ProcessMetrics(CollectorRegistry(), ["postgres"])
    assert metrics._is_idle()
    end = time.process_time() + 2 * process_metrics.IDLE_CPU_SECONDS
    while time.process_time() < end:
        pass
    assert not metrics._is_idle()
    assert metrics._is_idle()


def test_unchanged_value_is_not_written_again() -> None:
    """With several processes each write is a system call."""
    metrics = ProcessMetrics(CollectorRegistry(), ["postgres"])
    gauge = metrics.gauge("size", "")
    metrics.set(gauge, 0)
    gauge.set(5)
    metrics.set(gauge, 0)
    assert metrics.registry.get_sample_value("size") == 5
    metrics.set(gauge, 1)
    assert metrics.registry.get_sample_value("size") == 1
