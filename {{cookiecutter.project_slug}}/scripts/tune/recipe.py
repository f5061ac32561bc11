"""The requests that `make tune` sends: each creates one job. Replace them by those of your feature.

A request is sent again for each point of the grid, after the table of jobs was emptied.
"""

import json
from collections.abc import Awaitable, Callable

from scripts.tune.users import Request, Response

LINE = "Thanks for the quick reply, it works, although the first one was late and wrong. "
#: A long conversation, whose score takes some milliseconds of CPU.
LINES = [LINE * 20] * 100

Send = Callable[[Request], Awaitable[Response]]


async def prepare(send: Send) -> Request:
    """Store what one job needs; return the request that creates the job."""
    body = json.dumps({"lines": LINES}).encode()
    created = await send(Request("/conversations", body))
    return Request(f"{created.location}/end")
