"""The example backend's relay: what dies, waits or is done twice between the outbox and the queue."""

import asyncio
import signal
import sqlite3
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog
from redis.asyncio import Redis
from sqlalchemy.orm import Session, sessionmaker

from demo.servers import RedisServer, redis_server
from examples.backend.content import Tier, order
from examples.backend.publishing import to_queue
from examples.backend.relay import Relay
from examples.backend.tables import open_sessions
from schemas.entries import decode_entry
from schemas.keys import Keys, Priority
from tests.integration.backend_kit import (
    backend_process,
    contents,
    fill,
    logged,
    ordered,
    outbox,
    serving,
    settings_for,
    shown,
)
from tests.integration.client_kit import PATIENCE_S, Ender, a_client, a_redis, until
from tests.integration.queue_kit import entries


@pytest.fixture
def sessions(database_url: str) -> Iterator[sessionmaker[Session]]:
    opened = open_sessions(database_url)
    fill(opened)
    yield opened
    opened.kw["bind"].dispose()


def place(sessions: sessionmaker[Session], count: int = 1, *, timeout_s: float = 300) -> list[str]:
    """Orders without the application; their job ids."""
    return [order(sessions, "ann", "x", Tier.STANDARD, timeout_s=timeout_s).job_id for _ in range(count)]


def relay_to(sessions: sessionmaker[Session], publish: Any) -> Relay:
    return Relay(sessions, publish, poll_s=0.05, committed=asyncio.Event())


async def job_ids(redis: Redis, keys: Keys) -> list[str | None]:
    return [decode_entry(fields).job_id for _, fields in await entries(redis, keys.requests(Priority.NORMAL))]


async def test_a_full_outbox_is_published_in_order_whoever_else_publishes_it(
    redis_at: RedisServer, redis: Redis, keys: Keys, sessions: sessionmaker[Session]
) -> None:
    placed = place(sessions, 250)
    async with a_client(redis_at.url, keys) as client:
        assert await relay_to(sessions, partial(to_queue, client)).publish_all() == 0
        assert await job_ids(redis, keys) == placed
        assert outbox(sessions) == []
        placed += place(sessions, 150)
        await asyncio.gather(*(relay_to(sessions, partial(to_queue, client)).publish_all() for _ in range(3)))
    assert sorted(map(str, await job_ids(redis, keys))) == sorted(placed)
    assert {row.status for row in contents(sessions)} == {"pending"}


async def test_a_full_queue_keeps_the_rest_in_the_outbox_until_it_has_room(
    redis_at: RedisServer, redis: Redis, keys: Keys, sessions: sessionmaker[Session], ann: Ender
) -> None:
    placed = place(sessions, 3)
    async with a_client(redis_at.url, keys, max_queue=2) as client:
        relay = relay_to(sessions, partial(to_queue, client))
        assert await relay.publish_all() == 30
        assert [entry.job_id for entry in outbox(sessions)] == placed[2:]
        await ann.succeed_next()
        assert await relay.publish_all() == 0
    assert await job_ids(redis, keys) == placed[1:]
    assert {row.status for row in contents(sessions)} == {"pending"}


async def test_an_order_is_taken_while_redis_is_down_and_published_when_it_is_back(
    tmp_path: Path, keys: Keys, database_url: str, sessions: sessionmaker[Session]
) -> None:
    with redis_server(tmp_path) as server:
        port, url = server.port, server.url
    async with serving(settings_for(url, keys, database_url)) as web:
        with structlog.testing.capture_logs() as logs:
            order = await ordered(web)
            await until(lambda: logged(logs, "relay.waiting"))
        assert [entry.job_id for entry in outbox(sessions)] == [order["job_id"]]
        with redis_server(tmp_path, port=port):
            async with a_redis(url) as redis:
                await until(lambda: _has(redis, keys, 1))
                await Ender(redis, keys, "ann").succeed_next()
            assert (await shown(web, order["content_id"]))["status"] == "succeeded"


async def _has(redis: Redis, keys: Keys, count: int) -> bool:
    return await redis.xlen(keys.requests(Priority.NORMAL)) == count


async def test_a_relay_killed_between_publishing_and_its_mark_makes_one_job(
    redis_at: RedisServer, redis: Redis, keys: Keys, tmp_path: Path
) -> None:
    database = tmp_path / "backend.db"
    opened = open_sessions(f"sqlite:///{database}")
    fill(opened)
    placed = place(opened, 5)
    environment = {
        "REDIS_URL": redis_at.url,
        "SDXL_PREFIX": keys.prefix,
        "DATABASE_URL": f"sqlite:///{database}",
    }
    writer = sqlite3.connect(database, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")  # the relay can read, but not mark
    with backend_process(environment, tmp_path, "relay") as process:
        await until(lambda: _has(redis, keys, 5))
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE_S)
    writer.execute("ROLLBACK")
    writer.close()
    assert [entry.job_id for entry in outbox(opened)] == placed
    with backend_process(environment, tmp_path, "relay"):
        await until(lambda: _marked(opened))
    assert await job_ids(redis, keys) == placed
    opened.kw["bind"].dispose()


async def _marked(sessions: sessionmaker[Session]) -> bool:
    return not await asyncio.to_thread(outbox, sessions)
