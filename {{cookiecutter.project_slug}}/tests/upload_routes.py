"""The service with uploads: routes with limits of their own, and the example of docs/uploads.md."""

import asyncio
import os
import sys
from pathlib import Path
from types import ModuleType

from fastapi import APIRouter, FastAPI, Request

from app.web.body_limit import max_body
from tests.fault_routes import app

DOCUMENT = Path(__file__).parent.parent / "docs/uploads.md"


def load_example() -> ModuleType:
    """Return the module in docs/uploads.md."""
    (source,) = [
        block.partition("\n```")[0]
        for block in DOCUMENT.read_text().split("```python\n")
        if block.startswith('"""')
    ]
    module = ModuleType("example")
    sys.modules["example"] = module
    exec(compile(source, str(DOCUMENT), "exec"), module.__dict__)
    return module


router = APIRouter(prefix="/uploads")


@router.post("/kept")
@max_body(3_000_000, seconds=3)
async def keep(request: Request, wait_seconds: float = 0) -> int:
    """Return the size of a body that is kept."""
    size = len(await request.body())
    await asyncio.sleep(wait_seconds)
    return size


@router.post("/small")
@max_body(1000)
async def accept_little(request: Request) -> int:
    """Return the size of a small body."""
    return len(await request.body())


@router.post("/streamed")
@max_body(50_000_000, streamed=True)
async def stream(request: Request) -> int:
    """Return the size of a body that is not kept."""
    size = 0
    async for part in request.stream():
        size += len(part)
    return size


if "OVERSIZED_ROUTE" in os.environ:
    router.post("/oversized")(max_body(20_000_000)(accept_little))

app.include_router(router)
mounted = FastAPI()
mounted.include_router(router)
app.mount("/mounted-uploads", mounted)
if "FILES_DIRECTORY" in os.environ:
    app.include_router(load_example().router)
