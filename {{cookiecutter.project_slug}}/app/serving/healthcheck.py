"""The container's health check, without curl.

`python -m app.serving.healthcheck [path]` exits with 0 if the response is a 200.
"""

import http.client
import os
import sys

TIMEOUT_SECONDS = 2
#: Where to connect to a service that listens on all interfaces.
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "[::]": "::1"}  # noqa: S104 - nothing is bound here


def check(path: str = "/health/live") -> bool:
    """Return whether the service in this container responds 200.

    Parses `BIND` and `PORT` itself: importing app/settings.py would take four times as long, every
    ten seconds.
    """
    port = os.environ.get("PORT") or "8000"
    bind = os.environ.get("BIND") or f"127.0.0.1:{port}"
    host, _, port = bind.rpartition(":")
    host = _LOOPBACK.get(host, host.strip("[]"))
    connection = http.client.HTTPConnection(host, int(port), timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(not check(*sys.argv[1:2]))
