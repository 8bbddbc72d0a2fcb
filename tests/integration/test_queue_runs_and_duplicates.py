"""Which entry owns a run, on a real Redis."""

import pytest
from redis.asyncio import Redis

from schemas.keys import Keys
from tests.integration.queue_kit import FakeConsumer, a_request, completions, job, publish, where_is


async def duplicates(redis: Redis, keys: Keys) -> int:
    return int(await redis.hget(keys.counters, "duplicates") or 0)


async def test_the_first_entry_of_a_run_owns_it_and_later_ones_vanish_without_an_event(
    redis: Redis, keys: Keys, ann: FakeConsumer
) -> None:
    await publish(redis, keys, a_request())
    await publish(redis, keys, a_request())
    await publish(redis, keys, a_request(steps=30))
    lease, begun = await ann.take()
    assert begun.verdict == "ok"
    assert [(await ann.take())[1].verdict for _ in range(2)] == ["duplicate", "duplicate"]
    assert await where_is(redis, keys) == ["pending"]
    await ann.fail(lease)
    assert len(await completions(redis, keys)) == 1
    assert await duplicates(redis, keys) == 2


async def test_an_invalid_duplicate_vanishes_too(redis: Redis, keys: Keys, ann: FakeConsumer) -> None:
    await publish(redis, keys, a_request())
    await ann.take()
    await redis.xadd(keys.request_streams[1], {"payload": '{"job_id":"job-1"}'})
    _, begun = await ann.take()
    assert begun.verdict == "duplicate"
    assert await completions(redis, keys) == []


@pytest.mark.parametrize("state", ["failed", "cancelled"])
async def test_the_next_run_is_taken_after_a_failed_or_cancelled_one(
    redis: Redis, keys: Keys, ann: FakeConsumer, state: str
) -> None:
    await publish(redis, keys, a_request())
    lease, _ = await ann.take()
    await ann.leases.progress(lease, 1, 20, 0.0)
    await ann.fail(lease)
    await redis.hset(keys.job("job-1"), "state", state)
    await publish(redis, keys, a_request(steps=40), run=2)
    lease, begun = await ann.take()
    assert (begun.verdict, begun.attempt) == ("ok", 1)
    held = await job(redis, keys)
    assert (held["run"], held["state"]) == ("2", "preparing")
    assert "event" not in held
    assert "ended_at" not in held
    assert '"steps":40' in held["payload"]
    assert await redis.ttl(keys.job("job-1")) == -1
    assert await redis.exists(keys.progress("job-1")) == 0


async def test_the_next_run_is_not_taken_after_a_success_nor_while_the_last_one_goes_on(
    redis: Redis, keys: Keys, ann: FakeConsumer
) -> None:
    await publish(redis, keys, a_request())
    lease, _ = await ann.take()
    await publish(redis, keys, a_request(), run=2)
    assert (await ann.take())[1].verdict == "duplicate"
    await ann.fail(lease)
    await redis.hset(keys.job("job-1"), "state", "succeeded")
    await publish(redis, keys, a_request(), run=2)
    assert (await ann.take())[1].verdict == "duplicate"


@pytest.mark.parametrize("run", [1, 3, 7])
async def test_a_run_that_is_not_the_next_is_a_duplicate(redis: Redis, keys: Keys, ann: FakeConsumer, run: int) -> None:
    await publish(redis, keys, a_request())
    lease, _ = await ann.take()
    await ann.fail(lease)
    await publish(redis, keys, a_request(), run=run)
    assert (await ann.take())[1].verdict == "duplicate"


async def test_after_the_hash_has_expired_an_id_is_new_whatever_its_run(
    redis: Redis, keys: Keys, ann: FakeConsumer
) -> None:
    await publish(redis, keys, a_request(), run=4)
    _, begun = await ann.take()
    assert (begun.verdict, begun.attempt) == ("ok", 1)
    assert (await job(redis, keys))["run"] == "4"
