"""The service. Start reading at main.py, then lifespan.py, observe.py, health.py and server.py."""
