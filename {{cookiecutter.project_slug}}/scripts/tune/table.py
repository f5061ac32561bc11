"""The table of `make tune`: Markdown, one line for each point."""

from scripts.tune.point import Point

COLUMNS = (
    "processes",
    "at once",
    "jobs/s",
    "p50 ms",
    "p95 ms",
    "request to end, p95 s",
    "CPU",
    "CPU ms/job",
    "queue",
    "connections",
    "MB",
)
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def line(point: Point) -> str:
    """Return the line of a point. A point that reached its time limit has a star."""
    rate = f"{point.jobs_per_second:.1f}" + ("" if point.is_complete else "*")
    values = (
        point.processes,
        point.concurrency,
        rate,
        f"{point.p50_ms:.0f}",
        f"{point.p95_ms:.0f}",
        f"{point.request_p95_seconds:.1f}",
        f"{point.cpus_used * 100:.0f} %",
        f"{point.cpu_ms_per_job:.1f}",
        point.queue,
        point.connections,
        f"{point.memory_mb:.0f}",
    )
    return f"| {' | '.join(str(value) for value in values)} |"
