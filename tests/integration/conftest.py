"""The queue's two sides for one test: a client, commands, and consumers by name; and a store that checks signatures."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from demo.servers import RedisServer
from producer.client import AsyncGenerationClient
from schemas.keys import Keys
from tests.integration.cli_kit import Cli, a_cli
from tests.integration.client_kit import Ender, a_client
from tests.s3_stub import S3Stub, running_stub


@pytest.fixture
async def client(redis_at: RedisServer, keys: Keys) -> AsyncIterator[AsyncGenerationClient]:
    async with a_client(redis_at.url, keys) as client:
        yield client


@pytest.fixture
def cli(redis_at: RedisServer, keys: Keys, tmp_path: Path) -> Iterator[Cli]:
    with a_cli(redis_at, keys, tmp_path) as cli:
        yield cli


@pytest.fixture
def ann(redis: Redis, keys: Keys) -> Ender:
    return Ender(redis, keys, "ann")


@pytest.fixture
def bob(redis: Redis, keys: Keys) -> Ender:
    return Ender(redis, keys, "bob")


@pytest.fixture
async def stub() -> AsyncIterator[S3Stub]:
    async with running_stub() as stub:
        yield stub
