"""A hundred routes, in ten routers of ten."""

from fastapi import APIRouter, FastAPI

ROUTERS = 10
ROUTES = 10


async def read(number: int) -> dict[str, int]:
    """Return the number."""
    return {"number": number}


def add_routes(app: FastAPI) -> None:
    """Add the routes to an application."""
    for router_number in range(ROUTERS):
        router = APIRouter(prefix=f"/resource{router_number}")
        for number in range(ROUTES):
            path = f"/item{number}/" + "{number}"
            router.add_api_route(path, read, methods=["GET"])
        app.include_router(router)
