"""The application of `create_app`, with the routes and the middleware that a team adds there."""

import httpx

from app.main import create_app
from app.settings import Settings
from tests.conftest import InProcess

ORIGIN = "https://shop.example"


async def test_root_names_the_service(client: httpx.AsyncClient, settings: Settings) -> None:
    response = await client.get("/")
    assert response.status_code == 200
    names = {"service": settings.service_name, "version": settings.service_version}
    assert response.json() == names


async def test_allowed_origin_may_read_responses(settings: Settings) -> None:
    """Fetch standard, "CORS protocol": browsers show a page only what its origin may read."""
    allowing = settings.model_copy(update={"cors_allow_origins": (ORIGIN,)})
    async with InProcess(create_app(allowing)) as client:
        response = await client.get("/", headers={"Origin": ORIGIN})
        other = await client.get("/", headers={"Origin": "https://other.example"})
    assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert "Access-Control-Allow-Origin" not in other.headers
