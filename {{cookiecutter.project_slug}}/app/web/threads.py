"""Threads behind `def` routes, which nothing can cancel."""

import asyncio
from typing import Any

from anyio._backends._asyncio import _task_states

#: How often a cancellation that waits for a thread is tried.
RETRY_SECONDS = 0.5


def cancel_after_thread(task: asyncio.Task[Any]) -> None:
    """Cancel a task: at once, or when the thread for which it waits has ended.

    anyio limits its threads to 40, with a token for each. It shields the wait for a thread from
    its own cancellations, but not from asyncio's: the task would return its token while the thread
    runs on. After 350 requests that had timed out, there were 281 threads.
    """
    if task.done():
        return
    if _is_shielded(task):
        task.get_loop().call_later(RETRY_SECONDS, cancel_after_thread, task)
    else:
        task.cancel()


def _is_shielded(task: asyncio.Task[Any]) -> bool:
    state = _task_states.get(task)
    return state is not None and state.cancel_scope is not None and state.cancel_scope.shield
