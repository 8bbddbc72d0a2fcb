"""The listener killed between commit and acknowledgement, PostgreSQL stopped under it, two of them at once."""

import asyncio
import json
import os
import random
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy import Engine

from demo.servers import RedisServer
from producer.database import open_engine
from producer.store import Store
from schemas.events import Event
from schemas.keys import JobState, Keys
from tests.event_kit import failed, retrying, started, succeeded
from tests.integration.listener_kit import (
    PATIENCE_S,
    make_listener,
    publish,
    reading,
    running,
    state,
    until,
    until_acknowledged,
)
from tests.integration.store_kit import everything, rows
from tests.postgres import PostgresServer, postgres_server

HOOK = "https://backend.example/hook"


@asynccontextmanager
async def listening(
    redis_at: RedisServer, keys: Keys, database_url: str, *options: str, stdout: int = PIPE
) -> AsyncIterator[Process]:
    """`python -m producer listen --json` as a process of its own."""
    environment = {"REDIS_URL": redis_at.url, "SDXL_PREFIX": keys.prefix, "DATABASE_URL": database_url}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "producer", "listen", "--json", *options),
        env=os.environ | environment,
        stdout=stdout,
        stderr=PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def wordy(number: int) -> Event:
    """An event of about 4 KB."""
    return failed(f"job-{number}", error="no " * 1300)


async def pending(redis: Redis, keys: Keys) -> list[dict[str, Any]]:
    return list(await redis.xpending_range(keys.completions, "listeners", "-", "+", 200))


async def test_a_listener_killed_between_commit_and_acknowledgement_repeats_its_events_and_no_row(
    redis_at: RedisServer, redis: Redis, keys: Keys, database_url: str, engine: Engine
) -> None:
    events = [wordy(number) for number in range(80)]
    for number in range(80):
        request = {"job_id": f"job-{number}", "prompt": "a fox", "webhook_url": HOOK}
        await redis.hset(keys.job(f"job-{number}"), "payload", json.dumps(request))
    await publish(redis, keys, *events)
    # It prints each event after the commit and before the acknowledgement. Nobody reads, so it stays in there.
    unread, full = os.pipe()
    async with listening(redis_at, keys, database_url, stdout=full) as process, asyncio.timeout(PATIENCE_S):
        while not await has_rows(engine, 80):
            await asyncio.sleep(0.02)
        before = everything(engine)
        held = await pending(redis, keys)
        assert len(held) == 80
        process.kill()
        await process.wait()
    os.close(unread)
    os.close(full)
    assert {table: len(found) for table, found in before.items()} == {
        "jobs": 80,
        "events": 80,
        "images": 0,
        "deliveries": 80,
        "disabled_endpoints": 0,
    }
    [dead] = {entry["consumer"] for entry in held}  # an hour passes
    await redis.xclaim(
        keys.completions, "listeners", dead, 0, [entry["message_id"] for entry in held], idle=3_600_000, justid=True
    )
    async with listening(redis_at, keys, database_url, "--once") as process, asyncio.timeout(PATIENCE_S):
        out, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert [json.loads(line)["id"] for line in out.splitlines()] == [event.id for event in events]
    assert await pending(redis, keys) == []
    assert everything(engine) == before


async def has_rows(engine: Engine, count: int) -> bool:
    try:
        return len(await asyncio.to_thread(rows, engine, "events")) == count
    except Exception:  # the tables are not there yet
        return False


@pytest.fixture
def own_postgres(postgres_at: PostgresServer) -> Iterator[PostgresServer]:
    """A server that only this test uses, so that it may stop it."""
    del postgres_at  # which has told whether there can be one
    with postgres_server() as server:
        yield server


async def test_postgresql_may_be_stopped_and_started_and_the_listener_process_goes_on(
    redis_at: RedisServer, redis: Redis, keys: Keys, own_postgres: PostgresServer
) -> None:
    url = own_postgres.create_database()
    async with listening(redis_at, keys, url) as process, asyncio.timeout(PATIENCE_S * 2):
        assert process.stdout is not None
        assert process.stderr is not None
        printed = []
        await publish(redis, keys, started(), retrying())
        printed += [json.loads(await process.stdout.readline())["id"] for _ in range(2)]
        own_postgres.stop()
        await publish(redis, keys, started(attempt=2), succeeded(attempt=2), failed("job-2"))
        while b"listener.waiting" not in await process.stderr.readline():
            pass
        assert await pending(redis, keys)
        await publish(redis, keys, started("job-3"))
        own_postgres.start()
        printed += [json.loads(await process.stdout.readline())["id"] for _ in range(4)]
        await until_acknowledged(redis, keys)
        process.terminate()
        assert await process.wait() == 0
    engine = open_engine(url)
    kept = everything(engine)
    store = Store(engine)
    assert (state(store), state(store, "job-2"), state(store, "job-3")) == (
        JobState.SUCCEEDED,
        JobState.FAILED,
        JobState.RUNNING,
    )
    engine.dispose()
    assert sorted(printed) == [row["event_id"] for row in kept["events"]]
    assert len(printed) == 6


async def test_two_listeners_of_a_group_at_once_share_the_events_and_double_none(
    redis_at: RedisServer, redis: Redis, keys: Keys, store: Store, engine: Engine, database_url: str
) -> None:
    seen: dict[str, list[str]] = {"ann": [], "bob": []}
    events = [event for number in range(200) for event in (started(f"job-{number}"), succeeded(f"job-{number}"))]
    other = open_engine(database_url)
    async with reading(redis_at.url) as one, reading(redis_at.url) as two:
        ann = make_listener(redis, one, keys, store, "ann")
        bob = make_listener(redis, two, keys, Store(other), "bob")
        ann.on()(lambda event: seen["ann"].append(event.id))
        bob.on()(lambda event: seen["bob"].append(event.id))
        async with running(ann), running(bob):
            await publish(redis, keys, *events)
            await until(lambda: sum(map(len, seen.values())) >= len(events))
            await until_acknowledged(redis, keys)
    other.dispose()
    assert sorted(seen["ann"] + seen["bob"]) == sorted(event.id for event in events)
    assert all(seen.values())  # both had a share
    assert {row["state"] for row in rows(engine, "jobs")} == {"succeeded"}
    assert {table: len(found) for table, found in everything(engine).items() if found} == {
        "jobs": 200,
        "events": 400,
        "images": 200,
    }


@pytest.mark.parametrize("seed", range(2))
async def test_events_that_come_late_twice_and_in_any_order_end_in_the_same_rows(
    redis_at: RedisServer, redis: Redis, keys: Keys, store: Store, engine: Engine, seed: int
) -> None:
    chance = random.Random(seed)
    events: list[Event] = []
    for number in range(40):
        job_id = f"job-{number}"
        events += [started(job_id), retrying(job_id), started(job_id, attempt=2)]
        events.append(succeeded(job_id, attempt=2) if number % 2 else failed(job_id, attempt=2))
    stream = [*events, *chance.sample(events, 50)]
    chance.shuffle(stream)
    async with reading(redis_at.url) as reader:
        listener = make_listener(redis, reader, keys, store, "ann")
        for at in range(0, len(stream), 30):
            await publish(redis, keys, *stream[at : at + 30])
            await listener.catch_up()
        await publish(redis, keys, retrying("job-0", attempt=3), started("job-1", attempt=9))  # after their end
        await listener.catch_up()
    states = {row["job_id"]: (row["state"], row["attempt"]) for row in rows(engine, "jobs")}
    assert states == {f"job-{number}": ("succeeded" if number % 2 else "failed", 2) for number in range(40)}
    assert len(rows(engine, "events")) == len(events) + 2
    assert len(rows(engine, "images")) == 20
