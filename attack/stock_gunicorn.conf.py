"""The configuration that most services run with: gunicorn with uvicorn's worker as it comes, and time to finish."""

import os

bind = os.environ["BIND"]
workers = 2
worker_class = "uvicorn_worker.UvicornWorker"
preload_app = True
keepalive = 75
graceful_timeout = 30
accesslog = errorlog = "-"
