"""The errors of widgets that clients see."""

from app.errors import NotFoundError


class WidgetNotFoundError(NotFoundError):
    """There is none with this ID: 404."""

    def __init__(self) -> None:
        super().__init__("There is no such widget.")
