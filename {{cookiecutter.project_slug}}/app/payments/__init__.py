"""Payments, the example: accepted over HTTP, charged by a consumer, exactly once."""
