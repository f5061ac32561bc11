"""The gunicorn runtime: processes, signals, shutdown, HTTP connections.

The application never imports it; only gunicorn.conf.py does. A service seldom needs to edit it.
"""
