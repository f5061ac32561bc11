"""Postgres and Redis: clients that fail fast and survive restarts."""
