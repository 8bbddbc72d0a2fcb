"""How the backend reads plain data out of Redis: no server behaviour is at stake, so a fake one serves."""

from datetime import UTC, datetime
from typing import Any

import pytest
from fakeredis import FakeAsyncRedis

from producer.backlog import read_backlog
from producer.queue import ProducerQueue
from producer.submissions import QueueLimits
from schemas.keys import JobState, Keys, Priority

KEYS = Keys("unit")


@pytest.fixture
def redis() -> Any:
    return FakeAsyncRedis()


@pytest.fixture
def queue(redis: Any) -> ProducerQueue:
    return ProducerQueue(redis, KEYS, limits=QueueLimits(10), job_ttl_s=60)


async def test_a_job_that_nobody_knows_is_none(queue: ProducerQueue) -> None:
    assert await queue.job("nobody") is None


async def test_a_jobs_hash_is_read_with_its_types(redis: Any, queue: ProducerQueue) -> None:
    fields = {
        "state": "running",
        "run": "2",
        "attempt": "1",
        "priority": "high",
        "entry_id": "5-0",
        "consumer": "ann",
        "payload": b"{}",
        "submitted_at": "1700000000000",
    }
    await redis.hset(KEYS.job("job-1"), mapping=fields)
    job = await queue.job("job-1")
    assert job is not None
    assert (job.state, job.run, job.attempt, job.priority) == (JobState.RUNNING, 2, 1, Priority.HIGH)
    assert (job.consumer, job.ended_at_ms, job.event) == ("ann", None, None)


async def test_stats_name_every_stream_the_counters_and_who_lives(redis: Any, queue: ProducerQueue) -> None:
    await redis.xadd(KEYS.requests(Priority.LOW), {"payload": "x"})
    await redis.hset(KEYS.counters, "duplicates", 3)
    now_ms = int(datetime.now(UTC).timestamp() * 1000)
    await redis.zadd(KEYS.consumers, {"ann": 1_700_000_000_000, "bob": now_ms})
    await redis.hset(KEYS.consumer("ann"), mapping={"state": "idle", "gpu": "cpu"})
    stats = await queue.stats()
    assert stats["waiting"] == {"high": 0, "normal": 0, "low": 1}
    assert stats["counters"] == {"duplicates": 3}
    assert stats["consumers"] == [
        {"name": "ann", "last_heartbeat_ms": 1_700_000_000_000, "state": "idle", "gpu": "cpu", "live": False},
        {"name": "bob", "last_heartbeat_ms": now_ms, "live": True},
    ]


async def test_the_backlog_is_what_the_streams_hold(redis: Any) -> None:
    for priority in Priority:
        await redis.xadd(KEYS.requests(priority), {"payload": "x"})
    now_ms = datetime.now(UTC).timestamp() * 1000
    await redis.zadd(KEYS.delayed, {"due": now_ms - 5000, "later": now_ms + 3_600_000})
    backlog = await read_backlog(redis, KEYS)
    assert (backlog.waiting, backlog.live_consumers) == (4, 0)
