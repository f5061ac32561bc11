"""The usual configuration of gunicorn: uvicorn's own worker, and 30 s to finish requests.

`gunicorn --config python:labs.usual` reads it in place of gunicorn.conf.py.
"""

import os

bind = os.environ.get("BIND", "")
workers = int(os.environ.get("WEB_CONCURRENCY") or "1")
worker_class = "uvicorn_worker.UvicornWorker"
preload_app = True
keepalive = 75
graceful_timeout = 30
loglevel = "warning"
