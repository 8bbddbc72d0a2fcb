"""What the listener's tests share: listeners at work, events in the stream, and patience."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Redis

from producer.completions import Completions
from producer.listener import Enqueue, Listener
from producer.queue import connect_for_blocking_reads
from producer.store import Store
from schemas.events import Event
from schemas.keys import JobState, Keys
from tests.integration.queue_kit import add, entries

PATIENCE_S = 20.0


@asynccontextmanager
async def reading(url: str) -> AsyncIterator[Redis]:
    reader = connect_for_blocking_reads(url, block_s=1)
    yield reader
    await reader.aclose()


def make_listener(
    redis: Redis, reader: Redis, keys: Keys, store: Store, name: str, *, enqueue: Enqueue | None = None
) -> Listener:
    completions = Completions(redis, reader, keys, "listeners", name)
    return Listener(completions, store, enqueue=enqueue, block_s=0.05, upkeep_every_s=0.05, retry_cap_s=0.05)


@asynccontextmanager
async def running(listener: Listener) -> AsyncIterator[None]:
    """The listener at work; stopped, and found to have ended cleanly, at the block's end."""
    stop = asyncio.Event()
    task = asyncio.create_task(listener.run(stop))
    try:
        yield
    finally:
        stop.set()
        await asyncio.wait_for(task, PATIENCE_S)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


async def until_acknowledged(redis: Redis, keys: Keys, group: str = "listeners") -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            groups: Any = await redis.xinfo_groups(keys.completions)
            [*_, (last, _)] = await entries(redis, keys.completions)
            done = (info["pending"] == 0 and info["last-delivered-id"] == last for info in groups)
            if [info["name"] for info in groups] == [group.encode()] and all(done):
                return
            await asyncio.sleep(0.01)


async def publish(redis: Redis, keys: Keys, *events: Event) -> None:
    for event in events:
        fields: dict[str, str | bytes] = {"type": event.type, "job_id": event.data.job_id, "payload": event.encode()}
        await add(redis, keys.completions, fields)


def state(store: Store, job_id: str = "job-1") -> JobState | None:
    job = store.job(job_id)
    return job.state if job else None
