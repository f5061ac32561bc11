"""Benchmarks of the generated service against bare FastAPI and the most used template."""


class BenchError(Exception):
    """Stops the run; its text is the one line that is printed."""
