"""Print the events of payments as they are published, one JSON object per line: `python -m scripts.tail_events [STREAM]`."""

import json
import sys
import time
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from app.payments.service import STREAM
from app.settings import load_settings


def tail(stream: str) -> None:
    """Print what is in the stream, then what comes, until Ctrl-C."""
    redis: Any = Redis.from_url(load_settings().redis_url.get_secret_value(), decode_responses=True)
    last = "-"
    while True:
        for entry, fields in redis.xrange(stream, last, count=1000):
            last = f"({entry}"
            sys.stdout.write(json.dumps({"entry": entry, **fields}) + "\n")
            sys.stdout.flush()
        time.sleep(0.2)


if __name__ == "__main__":
    try:
        tail(*(sys.argv[1:] or [STREAM]))
    except KeyboardInterrupt:
        pass
    except RedisError as error:
        sys.exit(f"REDIS_URL: {error}")
