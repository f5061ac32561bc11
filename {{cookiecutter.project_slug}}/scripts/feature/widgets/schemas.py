"""Request and response bodies of the widgets routes."""

from datetime import datetime
from typing import Annotated
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _check_printable(value: str) -> str:
    if not value.isprintable():
        msg = "must consist of printable characters"
        raise ValueError(msg)
    return value


Name = Annotated[
    str, Field(min_length=1, max_length=100, examples=["one"]), AfterValidator(_check_printable)
]


class NewWidget(BaseModel):
    """The body of a request that creates one."""

    model_config = ConfigDict(extra="forbid")

    name: Name


class Widget(BaseModel):
    """A stored one."""

    widget_id: UUID
    name: str
    created_at: datetime


class Page(BaseModel):
    """The newest ones first."""

    items: list[Widget]
