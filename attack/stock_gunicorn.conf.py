"""The usual configuration: uvicorn's stock worker, and time to finish requests."""

import os

bind = os.environ["BIND"]
workers = 2
worker_class = "uvicorn_worker.UvicornWorker"
preload_app = True
keepalive = 75
graceful_timeout = 30
accesslog = "-"
errorlog = "-"
