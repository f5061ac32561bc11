"""Print payment events as they are published, one JSON object per line.

Usage: `python -m scripts.tail_events [STREAM]`, where STREAM is the whole name in Redis, by default
`payment-events` after the key prefix of this service.
"""

import json
import sys
import time
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from app.payments.events import STREAM
from app.settings import Settings, load_settings

BATCH = 1000
POLL_SECONDS = 0.2


def tail(settings: Settings, stream: str) -> None:
    """Print the events of the stream, old and new, until Ctrl-C."""
    url = settings.redis_url.get_secret_value()
    redis: Any = Redis.from_url(url, decode_responses=True)
    start = "-"
    while True:
        for entry, fields in redis.xrange(stream, start, count=BATCH):
            line = json.dumps({"entry": entry, **fields})
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
            start = f"({entry}"
        time.sleep(POLL_SECONDS)


def main() -> None:
    """Print until Ctrl-C. Raises `SystemExit` if Redis does not respond."""
    settings = load_settings()
    default = f"{settings.redis_key_prefix}:{STREAM}"
    stream = sys.argv[1] if len(sys.argv) > 1 else default
    try:
        tail(settings, stream)
    except KeyboardInterrupt:
        pass
    except RedisError as error:
        sys.exit(f"REDIS_URL: {error}")


if __name__ == "__main__":
    main()
