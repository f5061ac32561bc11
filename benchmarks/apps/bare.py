"""The baseline: bare FastAPI with one route of the generated service."""

from fastapi import FastAPI

app = FastAPI()


@app.get("/")
async def describe() -> dict[str, str]:
    """Return the same as the service."""
    return {"service": "my-service", "version": "0.0.0"}
