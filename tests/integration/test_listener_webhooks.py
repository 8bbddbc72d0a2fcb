"""Which events become deliveries, where to, and when they are enqueued."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import structlog
from redis import Redis as SyncRedis
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy import Engine

from demo.servers import RedisServer
from producer.client import AsyncGenerationClient
from producer.listener import Listener, from_settings
from producer.settings import ProducerSettings
from producer.store import Store
from producer.webhooks.queue import WebhookQueue
from schemas.keys import Keys
from tests.event_kit import cancelled, failed, started, succeeded
from tests.integration.client_kit import Ender
from tests.integration.listener_kit import make_listener, publish, reading, until_acknowledged
from tests.integration.queue_kit import add
from tests.integration.store_kit import everything, rows

CANARY = "c0ffee5ec2e7"
HOOK = "https://backend.example/hook"


class Enqueued:
    """Stands where the webhook queue does, and keeps what it is given."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.error: Exception | None = None

    def __call__(self, event_ids: Sequence[str]) -> None:
        self.batches.append(list(event_ids))
        if self.error is not None:
            raise self.error


@pytest.fixture
def enqueued() -> Enqueued:
    return Enqueued()


@pytest.fixture
async def listener(
    redis_at: RedisServer, redis: Redis, keys: Keys, store: Store, enqueued: Enqueued
) -> AsyncIterator[Listener]:
    async with reading(redis_at.url) as reader:
        yield make_listener(redis, reader, keys, store, "ann", enqueue=enqueued)


async def test_an_ended_job_with_a_webhook_has_one_delivery_that_is_enqueued(
    client: AsyncGenerationClient, ann: Ender, listener: Listener, engine: Engine, enqueued: Enqueued
) -> None:
    await client.submit(job_id="job-1", prompt="a fox", webhook_url=HOOK)
    await client.submit(job_id="job-2", prompt="a fox")
    await ann.succeed_next()
    await ann.fail_next()
    assert await listener.catch_up() == 4
    found = [(row["event_id"], row["job_id"], row["url"]) for row in rows(engine, "deliveries")]
    assert found == [("job-1:1:succeeded", "job-1", HOOK)]
    assert enqueued.batches == [["job-1:1:succeeded"]]


async def test_a_job_that_its_client_cancels_while_it_waits_is_delivered_too(
    client: AsyncGenerationClient, listener: Listener, enqueued: Enqueued
) -> None:
    await client.submit(job_id="job-1", prompt="a fox", webhook_url=HOOK)
    await client.cancel("job-1")
    await listener.catch_up()
    assert enqueued.batches == [["job-1:1:cancelled"]]


async def test_each_run_of_a_job_has_a_delivery_of_its_own(
    client: AsyncGenerationClient, ann: Ender, listener: Listener, engine: Engine
) -> None:
    await client.submit(job_id="job-1", prompt="a fox", webhook_url=HOOK)
    await ann.fail_next()
    await client.resubmit("job-1")
    await ann.succeed_next(run=2)
    await listener.catch_up()
    assert [row["event_id"] for row in rows(engine, "deliveries")] == ["job-1:1:failed", "job-1:2:succeeded"]


async def test_the_query_of_a_webhook_is_kept_nowhere_even_while_the_job_is_queued_again(
    client: AsyncGenerationClient, ann: Ender, listener: Listener, engine: Engine
) -> None:
    await client.submit(job_id="job-1", prompt="a fox", webhook_url=f"{HOOK}?token={CANARY}")
    await ann.fail_next()
    await client.resubmit("job-1", webhook_url=f"{HOOK}?token={CANARY}")  # its hash holds the query until it ends
    await listener.catch_up()
    [row] = rows(engine, "deliveries")
    assert row["url"] == HOOK
    assert CANARY not in str(everything(engine))


@pytest.mark.parametrize(
    "payload", [None, b"", b"\xff", b"{}", b'{"job_id":"job-1","webhook_url":"https://b.example/"}']
)
async def test_a_job_whose_request_is_not_known_has_no_delivery_and_is_stored_as_usual(
    redis: Redis, keys: Keys, listener: Listener, engine: Engine, enqueued: Enqueued, payload: bytes | None
) -> None:
    if payload is not None:
        await redis.hset(keys.job("job-1"), mapping={"state": "failed", "payload": payload})
    await publish(redis, keys, started(), failed())
    assert await listener.catch_up() == 2
    assert rows(engine, "deliveries") == []
    assert enqueued.batches == []


async def test_an_event_that_comes_twice_is_enqueued_once(
    redis: Redis, keys: Keys, client: AsyncGenerationClient, ann: Ender, listener: Listener, enqueued: Enqueued
) -> None:
    await client.submit(job_id="job-1", prompt="a fox", webhook_url=HOOK)
    event = await ann.succeed_next()
    await publish(redis, keys, event)
    await listener.catch_up()
    await publish(redis, keys, event)
    await listener.catch_up()
    assert enqueued.batches == [["job-1:1:succeeded"]]


async def test_a_webhook_is_enqueued_once_its_event_is_acknowledged_and_its_row_committed(
    redis_at: RedisServer,
    redis: Redis,
    keys: Keys,
    client: AsyncGenerationClient,
    ann: Ender,
    store: Store,
    engine: Engine,
) -> None:
    await client.submit(job_id="job-1", prompt="a fox", webhook_url=HOOK)
    await ann.succeed_next()
    seen: list[tuple[int, int]] = []

    def enqueue(event_ids: Sequence[str]) -> None:
        with SyncRedis.from_url(redis_at.url) as plain:
            summary: Any = plain.xpending(keys.completions, "listeners")
            seen.append((summary["pending"], len(rows(engine, "deliveries"))))

    async with reading(redis_at.url) as reader:
        await make_listener(redis, reader, keys, store, "ann", enqueue=enqueue).catch_up()
    assert seen == [(0, 1)]


async def test_a_webhook_that_cannot_be_enqueued_waits_in_its_row_and_holds_up_nothing(
    redis: Redis,
    keys: Keys,
    client: AsyncGenerationClient,
    ann: Ender,
    listener: Listener,
    engine: Engine,
    enqueued: Enqueued,
) -> None:
    await client.submit(job_id="job-1", prompt="a fox", webhook_url=HOOK)
    await ann.succeed_next()
    enqueued.error = RedisError(f"cannot reach https://redis.example/?password={CANARY}")
    with structlog.testing.capture_logs() as logs:
        assert await listener.catch_up() == 2
    await until_acknowledged(redis, keys)
    [line] = [entry for entry in logs if entry["event"] == "webhook.not_enqueued"]
    assert (line["events"], CANARY in str(line)) == (1, False)
    assert [row["state"] for row in rows(engine, "deliveries")] == ["pending"]


async def test_what_cannot_be_decoded_is_delivered_to_nobody(
    redis: Redis, keys: Keys, listener: Listener, enqueued: Enqueued
) -> None:
    await add(redis, keys.completions, {"payload": b"not json", "job_id": "job-1"})
    await listener.catch_up()
    assert enqueued.batches == []


async def test_a_listener_from_settings_puts_deliveries_into_the_queue_of_the_webhook_worker(
    redis_at: RedisServer, keys: Keys, client: AsyncGenerationClient, ann: Ender, database_url: str, engine: Engine
) -> None:
    await client.submit(job_id="job-1", prompt="a fox", webhook_url=HOOK)
    await ann.succeed_next()
    settings = ProducerSettings(REDIS_URL=redis_at.url, SDXL_PREFIX=keys.prefix, DATABASE_URL=database_url)
    async with from_settings(settings) as listener:
        assert await listener.catch_up() == 2
    assert [row["event_id"] for row in rows(engine, "deliveries")] == ["job-1:1:succeeded"]
    queue = WebhookQueue(redis_at.url, keys.prefix)
    assert queue.rq.get_job_ids() == [queue.job_id("job-1:1:succeeded")]
    queue.close()


async def test_events_of_every_kind_in_one_batch_go_where_they_belong(
    redis: Redis, keys: Keys, listener: Listener, engine: Engine, enqueued: Enqueued
) -> None:
    for number in range(3):
        payload = f'{{"job_id":"job-{number}","prompt":"a fox","webhook_url":"{HOOK}/{number}"}}'
        await redis.hset(keys.job(f"job-{number}"), "payload", payload)
    await publish(redis, keys, started("job-0"), succeeded("job-0"), failed("job-1"), started("job-2"), cancelled("x"))
    await listener.catch_up()
    assert [(row["event_id"], row["url"]) for row in rows(engine, "deliveries")] == [
        ("job-0:1:succeeded", f"{HOOK}/0"),
        ("job-1:1:failed", f"{HOOK}/1"),
    ]
    assert enqueued.batches == [["job-0:1:succeeded", "job-1:1:failed"]]


async def test_a_url_that_no_index_takes_has_no_delivery_and_one_that_just_fits_has(
    client: AsyncGenerationClient, ann: Ender, listener: Listener, enqueued: Enqueued
) -> None:
    longest = HOOK + "/" + "x" * (2047 - len(HOOK))
    await client.submit(job_id="job-1", prompt="a fox", webhook_url=longest)
    await client.submit(job_id="job-2", prompt="a fox", webhook_url=longest + "x")
    await ann.succeed_next()
    await ann.succeed_next()
    await listener.catch_up()
    assert enqueued.batches == [["job-1:1:succeeded"]]
