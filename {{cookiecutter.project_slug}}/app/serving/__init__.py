"""The gunicorn runtime: drain, recycling, protocol. A service normally never edits it."""
