"""The widgets feature as it stands: its routes in the application, its table in the database.

`make feature` does not copy this file: a feature of the project has its line in `app/main.py` and
its migration in `migrations/versions`.
"""

import asyncio
import io
from collections.abc import AsyncIterator

import asyncpg
import httpx
import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations

from app.main import create_app
from app.settings import Settings
from scripts.feature import migration
from scripts.feature.widgets.router import router
from tests.conftest import InProcess


def _statements() -> str:
    """Return the SQL of the feature's migration."""
    output = io.StringIO()
    options = {"as_sql": True, "output_buffer": output}
    context = MigrationContext.configure(dialect_name="postgresql", opts=options)
    with Operations.context(context):
        migration.upgrade()
    return output.getvalue()


async def _execute(url: str, statements: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(statements)
    await connection.close()


@pytest.fixture
def clean_database(clean_database: str) -> str:
    """A new database, which has the table of the feature as well."""
    asyncio.run(_execute(clean_database, _statements()))
    return clean_database


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application, which has the routes of the feature as well."""
    app = create_app(settings)
    app.include_router(router)
    async with InProcess(app) as client:
        yield client
