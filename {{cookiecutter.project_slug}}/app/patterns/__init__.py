"""Patterns that survive crashes and outages. Each is read alone, and taken alone: with its table, and its tests."""
