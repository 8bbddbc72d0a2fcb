"""The queue's two sides for one test: a client, commands, and consumers by name; and a store that checks signatures."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from redis.asyncio import Redis
from sqlalchemy import Engine

from demo.servers import RedisServer, S3Server
from producer.client import AsyncGenerationClient
from producer.database import open_engine
from producer.gateway import create_app
from producer.settings import ProducerSettings
from producer.store import Store
from schemas.keys import Keys
from tests.integration.cli_kit import Cli, a_cli
from tests.integration.client_kit import Ender, a_client
from tests.integration.gateway_kit import BUCKET, Painter, calling, gateway_settings
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
def engine(database_url: str) -> Iterator[Engine]:
    """An engine for an empty database: once SQLite, once PostgreSQL."""
    opened = open_engine(database_url)
    yield opened
    opened.dispose()


@pytest.fixture
def store(engine: Engine) -> Store:
    """The listener's tables, empty."""
    opened = Store(engine)
    opened.migrate()
    return opened


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


@pytest.fixture
def gateway_env(redis_at: RedisServer, s3_at: S3Server, keys: Keys) -> ProducerSettings:
    """The gateway's settings: a token, and a bucket that is there."""
    s3_at.create_bucket(BUCKET)
    return gateway_settings(redis_at, keys, s3_at)


@pytest.fixture
async def http(gateway_env: ProducerSettings) -> AsyncIterator[httpx.AsyncClient]:
    """A caller of a gateway that is served on a real socket."""
    async with calling(create_app(gateway_env)) as http:
        yield http


@pytest.fixture
def painter(redis: Redis, keys: Keys, s3_at: S3Server) -> Painter:
    painter = Painter(redis, keys, "pat")
    painter.s3 = s3_at
    return painter


@pytest.fixture
def short_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is told to stop is at its wait for entries, mostly."""
    monkeypatch.setattr("consumer.worker.BLOCK_S", 0.1)
