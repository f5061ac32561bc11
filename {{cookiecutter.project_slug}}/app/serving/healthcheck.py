"""The container's HEALTHCHECK, without curl: `python -m app.serving.healthcheck [path]` ends with 0 if the answer is 200."""

import http.client
import os
import sys

TIMEOUT_SECONDS = 2


def check(path: str = "/health/live") -> bool:
    """Ask the service of this container; tell whether it answered 200.

    Reads `BIND` and `PORT` itself: app/settings.py would take four times as long, every ten seconds.
    """
    host, _, port = (
        os.environ.get("BIND") or f"127.0.0.1:{os.environ.get('PORT') or 8000}"
    ).rpartition(":")
    here = {"0.0.0.0": "127.0.0.1", "[::]": "::1"}.get(host, host.strip("[]"))  # noqa: S104 - it is asked, not bound
    connection = http.client.HTTPConnection(here, int(port), timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(not check(*sys.argv[1:2]))
