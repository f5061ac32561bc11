"""The process that a command of development ends with, such as make.

An editor kills `make dev` with SIGKILL, which no program can pass on to its children.
"""

import os

#: Set by the Makefile: a parent that has ended before this process reads its pid is noticed too.
VARIABLE = "DEV_PARENT"


class Parent:
    """The process that has started this one."""

    def __init__(self, pid: int | None = None) -> None:
        """`pid`: as the parent has passed it, by default in `DEV_PARENT`, which children lose."""
        passed = os.environ.pop(VARIABLE, "")
        self.pid = pid or int(passed or os.getppid())

    @property
    def is_running(self) -> bool:
        """Whether it has not ended: an orphan gets another parent."""
        return os.getppid() == self.pid
