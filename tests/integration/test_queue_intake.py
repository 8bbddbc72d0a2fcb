"""Reading, reclaiming and promoting on a real Redis."""

import asyncio
from collections import Counter
from typing import Any

from redis.asyncio import Redis

from consumer.queue import Held, Lease, scripts
from schemas.keys import CONSUMER_GROUP, Keys, Priority
from tests.integration.queue_kit import (
    FakeConsumer,
    a_request,
    completions,
    entries,
    job,
    let_lease_run_out,
    publish,
    retrying,
)


async def test_entries_published_before_the_group_existed_are_read(redis: Redis, keys: Keys, ann: FakeConsumer) -> None:
    await publish(redis, keys, a_request())
    await ann.intake.ensure_groups()
    await ann.intake.ensure_groups()
    [delivery] = await ann.intake.read(block_ms=10)
    assert delivery.fields[b"payload"] == a_request().encode()


async def test_urgent_entries_come_first_and_no_stream_starves(redis: Redis, keys: Keys, ann: FakeConsumer) -> None:
    for priority in Priority:
        for number in range(32):
            await publish(redis, keys, a_request(f"{priority}-{number}"), priority)
    order = [keys.priority_of((await ann.read_one()).stream) for _ in range(32)]
    assert order[:3] == [Priority.HIGH] * 3
    for sixteen in (order[:16], order[16:]):
        assert Counter(sixteen) == {Priority.HIGH: 12, Priority.NORMAL: 3, Priority.LOW: 1}


async def test_with_everything_empty_a_read_waits_for_the_next_entry(
    redis: Redis, keys: Keys, ann: FakeConsumer
) -> None:
    await ann.intake.ensure_groups()
    # A connection of its own: a blocked one carries nothing else
    reading = asyncio.create_task(ann.intake.read(block_ms=5000))
    await asyncio.sleep(0.05)
    assert not reading.done()
    await publish(redis, keys, a_request(), Priority.LOW)
    [delivery] = await asyncio.wait_for(reading, 4)
    assert delivery.stream == keys.requests(Priority.LOW)


async def test_a_lost_group_is_created_again_and_reading_goes_on(redis: Redis, keys: Keys, ann: FakeConsumer) -> None:
    await ann.intake.ensure_groups()
    await redis.delete(*keys.request_streams)
    await publish(redis, keys, a_request())
    assert len(await ann.intake.read(block_ms=10)) == 1


async def test_reclaiming_goes_on_after_a_lost_group(redis: Redis, keys: Keys, ann: FakeConsumer) -> None:
    await ann.intake.ensure_groups()
    await redis.delete(*keys.request_streams)
    assert await ann.intake.reclaim(()) == []
    await publish(redis, keys, a_request())
    assert len(await ann.intake.read(block_ms=10)) == 1


async def test_a_delivery_that_got_lost_on_its_way_is_found_again(redis: Redis, keys: Keys, ann: FakeConsumer) -> None:
    await publish(redis, keys, a_request("a"))
    await publish(redis, keys, a_request("b"))
    held = await ann.read_one()
    lost = await ann.read_one()
    assert [delivery.entry_id for delivery in await ann.intake.unseen({held.place})] == [lost.entry_id]


async def test_a_group_that_one_stream_has_lost_hides_nothing_of_another(
    redis: Redis, keys: Keys, ann: FakeConsumer
) -> None:
    """Guards the second reading in `Intake._read_group`: a consumer asks once for what got lost."""
    await publish(redis, keys, a_request())
    lost = await ann.read_one()
    await redis.xgroup_destroy(keys.requests(Priority.LOW), CONSUMER_GROUP)
    assert [delivery.entry_id for delivery in await ann.intake.unseen(())] == [lost.entry_id]


async def test_a_live_consumers_entry_is_not_reclaimed_and_a_dead_ones_is(
    redis: Redis, keys: Keys, ann: FakeConsumer, bob: FakeConsumer
) -> None:
    await publish(redis, keys, a_request())
    delivery = await ann.read_one()
    assert await bob.intake.reclaim(()) == []
    await let_lease_run_out(redis, keys, delivery, "ann")
    assert [found.entry_id for found in await bob.intake.reclaim(())] == [delivery.entry_id]


async def test_every_dead_consumers_entry_is_found_in_the_end(
    redis: Redis, keys: Keys, ann: FakeConsumer, bob: FakeConsumer
) -> None:
    """The cursor of XAUTOCLAIM is kept from call to call, and starts again."""
    await ann.intake.ensure_groups()
    for number in range(25):
        await publish(redis, keys, a_request(f"job-{number}"))
    for _ in range(25):
        await let_lease_run_out(redis, keys, await ann.read_one(), "ann")
    found = {delivery.entry_id for _ in range(40) for delivery in await bob.intake.reclaim(())}
    assert len(found) == 25


async def test_an_entry_in_our_own_hands_is_not_taken_for_a_dead_ones(
    redis: Redis, keys: Keys, ann: FakeConsumer
) -> None:
    await publish(redis, keys, a_request())
    delivery = await ann.read_one()
    await let_lease_run_out(redis, keys, delivery, "ann")
    assert await ann.intake.reclaim({delivery.place}) == []


async def test_an_entry_deleted_under_its_owner_is_acknowledged_away(
    redis: Redis, keys: Keys, ann: FakeConsumer, bob: FakeConsumer
) -> None:
    await publish(redis, keys, a_request())
    delivery = await ann.read_one()
    await let_lease_run_out(redis, keys, delivery, "ann")
    await redis.xdel(delivery.stream, delivery.entry_id)
    assert await bob.intake.reclaim(()) == []
    assert await ann.intake.unseen(()) == []
    assert (await redis.xpending(delivery.stream, CONSUMER_GROUP))["pending"] == 0


async def test_an_entry_without_a_job_id_becomes_a_dead_letter_with_its_bytes(
    redis: Redis, keys: Keys, ann: FakeConsumer
) -> None:
    await redis.xadd(keys.requests(Priority.HIGH), {"payload": b"\xff\xfe not a request"})
    delivery = await ann.read_one()
    assert await ann.leases.bury(delivery, delivery.fields[b"payload"]) is Held.OK
    assert await ann.leases.bury(delivery, delivery.fields[b"payload"]) is Held.LOST
    [(_, letter)] = await entries(redis, keys.dead)
    assert letter[b"raw"] == b"\xff\xfe not a request"
    assert letter[b"source"] == keys.requests(Priority.HIGH).encode()
    assert await redis.xlen(delivery.stream) == 0
    assert await completions(redis, keys) == []


async def test_an_entry_that_was_read_and_not_begun_goes_back_too(
    redis: Redis, keys: Keys, ann: FakeConsumer, bob: FakeConsumer
) -> None:
    await publish(redis, keys, a_request())
    delivery = await ann.read_one()
    assert await ann.leases.release(Lease(delivery)) is Held.OK
    [found] = await bob.intake.reclaim(())
    assert found.entry_id == delivery.entry_id


async def test_a_delayed_job_whose_hash_is_gone_is_forgotten(redis: Redis, keys: Keys, ann: FakeConsumer) -> None:
    await redis.zadd(keys.delayed, {"ghost": 1})
    assert await ann.intake.promote() == 0
    assert await redis.zcard(keys.delayed) == 0
    assert await redis.xlen(keys.requests(Priority.NORMAL)) == 0


async def test_a_job_that_was_delayed_again_meanwhile_is_not_promoted_early(
    redis: Redis, keys: Keys, ann: FakeConsumer
) -> None:
    """Between listing what is due and moving it, another consumer may have moved it, failed and delayed it again."""
    await publish(redis, keys, a_request())
    lease, _ = await ann.take()
    await ann.leases.retry(lease, retrying(lease), 3600)
    promote = redis.register_script(scripts.PROMOTE)
    names = [keys.delayed, keys.job("job-1"), keys.cancel("job-1"), keys.requests(Priority.NORMAL)]
    assert await promote(keys=names, args=["job-1"]) == 0
    assert (await job(redis, keys))["state"] == "delayed"


async def test_two_consumers_promote_a_job_once(redis: Redis, keys: Keys, ann: FakeConsumer, bob: FakeConsumer) -> None:
    await publish(redis, keys, a_request())
    lease, _ = await ann.take()
    await ann.leases.retry(lease, retrying(lease), 0.0)
    await asyncio.sleep(0.002)
    assert sum(await asyncio.gather(ann.intake.promote(), bob.intake.promote())) == 1
    assert await redis.xlen(keys.requests(Priority.NORMAL)) == 1
    assert (await job(redis, keys))["state"] == "queued"


async def test_a_consumer_is_seen_among_the_living_until_it_leaves(redis: Redis, keys: Keys, ann: FakeConsumer) -> None:
    await ann.intake.ensure_groups()
    await ann.presence.heartbeat({"gpu": "cpu", "state": "idle"})
    living: Any = await redis.zrange(keys.consumers, 0, -1, withscores=True)
    [(name, seen_ms)] = living
    assert name == b"ann"
    seconds, _ = await redis.time()
    assert abs(seen_ms / 1000 - seconds) < 5
    assert await redis.hget(keys.consumer("ann"), "gpu") == b"cpu"
    await ann.presence.leave()
    assert await redis.zcard(keys.consumers) == 0
    assert await redis.exists(keys.consumer("ann")) == 0


async def test_a_consumer_that_lives_removes_the_events_that_every_group_has_acknowledged(
    redis: Redis, keys: Keys, ann: FakeConsumer
) -> None:
    """Guards the trimming in `Presence.heartbeat`."""
    ids = [await redis.xadd(keys.completions, {"payload": "{}"}) for _ in range(3)]
    await ann.presence.heartbeat({"gpu": "cpu"})
    assert await redis.xlen(keys.completions) == 3  # nobody has read them
    await redis.xgroup_create(keys.completions, "backend", id="0")
    await redis.xreadgroup("backend", "eve", {keys.completions: ">"})
    await redis.xack(keys.completions, "backend", *ids[:2])
    await ann.presence.heartbeat({"gpu": "cpu"})
    assert [entry_id for entry_id, _ in await entries(redis, keys.completions)] == ids[2:]


async def test_leaving_drops_nothing_that_is_still_pending(
    redis: Redis, keys: Keys, ann: FakeConsumer, bob: FakeConsumer
) -> None:
    await publish(redis, keys, a_request())
    delivery = await ann.read_one()
    await ann.presence.leave()
    await let_lease_run_out(redis, keys, delivery, "ann")
    assert len(await bob.intake.reclaim(())) == 1
