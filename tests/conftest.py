"""Real servers, started once for a session; every test has key names of its own."""

import os
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from demo.servers import RedisServer, S3Server, ServerFailed, redis_server, s3_server
from schemas.keys import Keys


def _missing(error: Exception) -> None:
    """A server that cannot be started fails the run in CI, and skips the test elsewhere."""
    if os.environ.get("CI"):
        raise error
    pytest.skip(str(error))


@pytest.fixture(scope="session")
def redis_at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    try:
        with redis_server(tmp_path_factory.mktemp("redis")) as server:
            yield server
    except ServerFailed as error:
        _missing(error)


@pytest.fixture(scope="session")
def s3_at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    try:
        with s3_server(tmp_path_factory.mktemp("s3")) as server:
            yield server
    except ServerFailed as error:
        _missing(error)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model, for reading only: who changes a model copies it first."""
    from demo import tiny_sdxl  # brings torch, which most tests do without

    return tiny_sdxl.build(tmp_path_factory.mktemp("model") / "tiny-sdxl")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Beside other work, threads that wait for each other make a picture ten times slower."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def keys() -> Keys:
    return Keys(f"t{uuid.uuid4().hex[:12]}")


@pytest.fixture
async def redis(redis_at: RedisServer) -> AsyncIterator[Redis]:
    client = Redis.from_url(redis_at.url)
    yield client
    await client.aclose()
