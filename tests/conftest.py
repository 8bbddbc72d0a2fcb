"""Real servers, started once for a session; every test has key names of its own."""

import functools
import gc
import os
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from botocore.loaders import JSONFileLoader
from redis.asyncio import Redis

from demo.servers import RedisServer, S3Server, ServerFailed, redis_server, s3_server
from schemas.keys import Keys
from tests.postgres import PostgresServer, create_schema, postgres_server

if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: kernels run on the CPU


@pytest.fixture(scope="session", autouse=True)
def _botocore_reads_a_file_once() -> Iterator[None]:
    """Each of its sessions would parse the same megabytes of JSON again, for a fifth of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JSONFileLoader, "load_file", staticmethod(functools.cache(JSONFileLoader().load_file)))
        yield


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
def postgres_at() -> Iterator[PostgresServer]:
    try:
        with postgres_server() as server:
            yield server
    except ServerFailed as error:
        _missing(error)


@pytest.fixture(scope="module")
def postgres_url(postgres_at: PostgresServer) -> str:
    """A database of the module's own, empty at its beginning."""
    return postgres_at.create_database()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of the test's own: once on SQLite, once on PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/listener.db"
    return create_schema(request.getfixturevalue("postgres_url"))


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


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """It would free what is in cycles, but late."""
    gc.collect()  # what other tests have left
    gc.disable()
    yield
    gc.enable()
