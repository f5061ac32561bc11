"""Processes for CPU-heavy work: the event loop of the worker stays free."""
