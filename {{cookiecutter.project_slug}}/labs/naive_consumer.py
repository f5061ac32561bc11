"""A naive consumer of payment events: in order, one by one, and again after each error.

It looks careful. No message is lost, and each is acknowledged only after its work. But one message
that can never be handled blocks all that come after it.

Usage: `python -m labs.naive_consumer`, with REDIS_URL, GATEWAY_URL and the name of the STREAM.
"""

import json
import os
import sys
import time
import urllib.request
from typing import Any

import redis

GROUP = "naive"
PAUSE_SECONDS = 0.2


def charge(payload: bytes) -> None:
    """Charge the payment of a message. Raises any error of it."""
    payment = json.loads(payload)
    headers = {"Idempotency-Key": payment["payment_id"], "Content-Type": "application/json"}
    url = f"{os.environ['GATEWAY_URL']}/charges"
    request = urllib.request.Request(url, payload, headers)
    with urllib.request.urlopen(request, timeout=5):
        pass


def handle_next(client: Any, stream: str) -> bool:
    """Handle the message that is not done yet, else the next one; return whether it was done."""
    for start in ("0", ">"):
        found = client.xreadgroup(GROUP, GROUP, {stream: start}, count=1)
        for entry, fields in found[0][1] if found else []:
            charge(fields[b"payload"])
            client.xack(stream, GROUP, entry)
            return True
    return False


def main() -> None:
    """Consume until SIGTERM."""
    client: Any = redis.Redis.from_url(os.environ["REDIS_URL"])
    stream = os.environ["STREAM"]
    client.xgroup_create(stream, GROUP, id="0", mkstream=True)
    while True:
        try:
            is_done = handle_next(client, stream)
        except Exception as error:  # noqa: BLE001 - it retries after every error
            is_done = False
            sys.stdout.write(f"will retry: {error!r}\n")
            sys.stdout.flush()
        if not is_done:
            time.sleep(PAUSE_SECONDS)


if __name__ == "__main__":
    main()
