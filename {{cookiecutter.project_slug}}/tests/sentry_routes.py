"""The service with Sentry, by the line of README.md, and a route with a bug."""

import os

import sentry_sdk

from app.main import create_app
from app.settings import load_settings

sentry_sdk.init(os.environ["SENTRY_DSN"], send_default_pii=False)
app = create_app(load_settings())


@app.get("/bug/{number}")
async def bug(number: int) -> None:
    """Raise."""
    raise ZeroDivisionError(number)
