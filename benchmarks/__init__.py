"""What the generated service costs, measured beside bare FastAPI and the most used peer: `make bench`."""


class BenchError(Exception):
    """What ends the run; its text is one line for whoever runs it."""
