"""A gate that lets in many at once, or one alone."""

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Alone:
    """Jobs run together; a job that may have killed its worker runs alone.

    If it does so again, no other job is lost with it. Otherwise each crash would count as a start
    of all jobs that ran at the same time, until they had failed too.
    """

    def __init__(self) -> None:
        self.inside = 0
        self.is_empty = asyncio.Event()
        self.is_empty.set()
        #: Held by a job that is alone, or waits for that: no other enters meanwhile.
        self.entrance = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def enter(self, *, alone: bool) -> AsyncIterator[None]:
        """Be inside for the block: with others, or alone."""
        if alone:
            async with self.entrance:
                await self.is_empty.wait()
                yield
            return
        async with self.entrance:
            self.inside += 1
            self.is_empty.clear()
        try:
            yield
        finally:
            self.inside -= 1
            if self.inside == 0:
                self.is_empty.set()
