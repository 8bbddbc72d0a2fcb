"""The backlog and `GET /health`, on a real Redis."""

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from redis.asyncio import Redis

from demo.servers import RedisServer
from producer.backlog import Backlog, read_backlog
from producer.health import create_app
from producer.settings import ProducerSettings
from schemas.keys import Keys, Priority
from tests.integration.queue_kit import FakeConsumer, a_request, publish, retrying


async def test_an_empty_queue_asks_for_nobody(redis: Redis, keys: Keys) -> None:
    assert await read_backlog(redis, keys) == Backlog(waiting=0, live_consumers=0)


async def test_queued_pending_and_due_jobs_count_and_those_that_wait_for_a_retry_do_not(
    redis: Redis, keys: Keys, ann: FakeConsumer
) -> None:
    for number, priority in enumerate(Priority):
        await publish(redis, keys, a_request(f"job-{number}"), priority)
    lease, _ = await ann.take()  # pending now; if Ann dies somebody has to come for it
    assert (await read_backlog(redis, keys)).waiting == 3
    await ann.leases.retry(lease, retrying(lease), 3600)
    assert (await read_backlog(redis, keys)).waiting == 2
    await redis.zadd(keys.delayed, {lease.job_id: 1})
    assert (await read_backlog(redis, keys)).waiting == 3


async def test_a_consumer_lives_as_long_as_its_heart_beats(redis: Redis, keys: Keys, ann: FakeConsumer) -> None:
    await ann.presence.heartbeat({"state": "idle"})
    await redis.zadd(keys.consumers, {"long-dead": 1})
    assert (await read_backlog(redis, keys)).live_consumers == 1


@pytest.fixture
def settings(redis_at: RedisServer, keys: Keys) -> ProducerSettings:
    return ProducerSettings(redis_url=SecretStr(redis_at.url), prefix=keys.prefix)


def test_health_is_200_with_the_backlog(settings: ProducerSettings) -> None:
    with TestClient(create_app(settings)) as client:
        answer = client.get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok", "waiting": 0, "live_consumers": 0})


def test_health_is_503_while_redis_is_away_and_tells_no_url() -> None:
    away = ProducerSettings(redis_url=SecretStr("redis://:pass@127.0.0.1:1/0"))
    with TestClient(create_app(away)) as client:
        answer = client.get("/health")
    assert answer.status_code == 503
    assert "pass" not in answer.text
