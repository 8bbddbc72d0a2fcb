"""The backlog and `GET /health`, on a real Redis."""

import httpx
from pydantic import SecretStr
from redis.asyncio import Redis

from demo.servers import RedisServer
from producer.backlog import Backlog, read_backlog
from producer.gateway import create_app
from schemas.keys import Keys, Priority
from tests.integration.gateway_kit import calling, gateway_settings, serving
from tests.integration.queue_kit import FakeConsumer, a_request, add, publish, retrying


async def test_an_empty_queue_asks_for_nobody(redis: Redis, keys: Keys) -> None:
    assert await read_backlog(redis, keys) == Backlog(waiting=0, live_consumers=0, oldest_waiting_s=0)


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


async def add_old(redis: Redis, keys: Keys, ago_s: int, priority: Priority = Priority.LOW) -> None:
    seconds, _ = await redis.time()
    entry_id = f"{(seconds - ago_s) * 1000}-0"
    await redis.xadd(keys.requests(priority), {"payload": "x"}, id=entry_id)


async def test_the_oldest_of_all_streams_and_of_what_is_due_says_how_long_something_waits(
    redis: Redis, keys: Keys
) -> None:
    await add(redis, keys.requests(Priority.HIGH), {"payload": "x"})
    seconds, _ = await redis.time()
    await redis.zadd(keys.delayed, {"later": (seconds + 3600) * 1000})
    assert (await read_backlog(redis, keys)).oldest_waiting_s < 60
    await add_old(redis, keys, 1000)
    assert 1000 <= (await read_backlog(redis, keys)).oldest_waiting_s < 1060
    await redis.zadd(keys.delayed, {"due": (seconds - 2000) * 1000})
    assert 2000 <= (await read_backlog(redis, keys)).oldest_waiting_s < 2060


async def test_health_is_200_with_the_backlog_and_needs_no_token(http: httpx.AsyncClient) -> None:
    answer = await http.get("/health", headers={"Authorization": ""})
    empty = {"status": "ok", "backlog": 0, "live_consumers": 0, "oldest_waiting_seconds": 0.0}
    assert (answer.status_code, answer.json()) == (200, empty)
    await http.post("/v1/jobs", json={"prompt": "a red fox"})
    assert (await http.get("/health")).json()["backlog"] == 1


async def test_health_is_503_when_something_has_waited_for_too_long_and_no_consumer_lives(
    http: httpx.AsyncClient, redis: Redis, keys: Keys, ann: FakeConsumer
) -> None:
    await add_old(redis, keys, 100)
    assert (await http.get("/health")).status_code == 200
    await add_old(redis, keys, 150, Priority.NORMAL)
    answer = await http.get("/health")
    assert (answer.status_code, answer.json()["status"], answer.json()["backlog"]) == (503, "unavailable", 2)
    assert answer.headers["Retry-After"] == "5"
    await ann.presence.heartbeat({"state": "idle"})
    assert (await http.get("/health")).status_code == 200


async def test_health_is_503_while_redis_is_away_and_tells_no_url(redis_at: RedisServer, keys: Keys) -> None:
    away = SecretStr("redis://:pass@127.0.0.1:1/0")
    settings = gateway_settings(redis_at, keys, None).model_copy(update={"redis_url": away})
    async with calling(create_app(settings)) as http:
        answer = await http.get("/health")
    assert (answer.status_code, answer.json()["error_code"]) == (503, "UNAVAILABLE")
    assert "pass@" not in answer.text


async def test_without_a_token_only_health_is_served_unless_it_is_for_everybody(
    redis_at: RedisServer, keys: Keys
) -> None:
    settings = gateway_settings(redis_at, keys, None, api_token=None)
    for for_everybody, status in ((False, 401), (True, 202)):
        async with (
            serving(create_app(settings, for_everybody=for_everybody)) as url,
            httpx.AsyncClient(base_url=url) as http,
        ):
            assert (await http.get("/health")).status_code == 200
            assert (await http.post("/v1/jobs", json={"prompt": "a red fox"})).status_code == status
