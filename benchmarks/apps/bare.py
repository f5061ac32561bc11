"""The yardstick: FastAPI and nothing else, with the route that the generated service has too."""

from fastapi import FastAPI

app = FastAPI()


@app.get("/")
async def describe() -> dict[str, str]:
    """Answer what the service answers."""
    return {"service": "my-service", "version": "0.0.0"}
