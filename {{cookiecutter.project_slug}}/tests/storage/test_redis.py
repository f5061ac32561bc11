"""The Redis client: each wait is bounded."""

import asyncio
import gc
import warnings

import pytest
from pydantic import SecretStr
from redis.exceptions import RedisError

from app.settings import Settings
from app.storage.redis import create_redis
from scripts.dev_services import free_port


async def test_unreachable_redis_fails_quickly(settings: Settings) -> None:
    """It also leaves no connection unclosed, of which Python would warn."""
    url = f"redis://127.0.0.1:{free_port()}"
    unreachable = settings.model_copy(update={"redis_url": SecretStr(url)})
    loop = asyncio.get_running_loop()
    async with create_redis(unreachable) as client:
        start = loop.time()
        with pytest.raises(RedisError):
            await client.ping()
        assert loop.time() - start < 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gc.collect()
