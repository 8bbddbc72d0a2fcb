"""The completions stream on a real Redis: groups, reading, reclaiming, trimming."""

from typing import Any

import pytest
from redis.asyncio import Redis

from producer.completions import Completions
from producer.queue import StreamEntry
from schemas.keys import Keys
from tests.event_kit import started
from tests.integration.queue_kit import add, entries


@pytest.fixture
def ann(redis: Redis, keys: Keys) -> Completions:
    return Completions(redis, redis, keys, "listeners", "ann")


@pytest.fixture
def bob(redis: Redis, keys: Keys) -> Completions:
    return Completions(redis, redis, keys, "listeners", "bob")


@pytest.fixture
def audit(redis: Redis, keys: Keys) -> Completions:
    """A group of its own."""
    return Completions(redis, redis, keys, "audit", "audrey")


async def publish(redis: Redis, keys: Keys, count: int = 1) -> list[str]:
    fields: dict[str, str | bytes] = {"type": "generation.started", "job_id": "job-1", "payload": started().encode()}
    return [await add(redis, keys.completions, fields) for _ in range(count)]


async def age(redis: Redis, keys: Keys, owner: str, entry_ids: list[str]) -> None:
    """Lets an hour pass since these entries were delivered to `owner`."""
    await redis.xclaim(keys.completions, "listeners", owner, 0, [*entry_ids], idle=3_600_000, justid=True)


async def pending(redis: Redis, keys: Keys, group: str = "listeners") -> int:
    summary: dict[str, Any] = await redis.xpending(keys.completions, group)
    return int(summary["pending"])


def ids(entries: list[StreamEntry]) -> list[str]:
    return [entry.entry_id for entry in entries]


async def test_a_group_sees_what_was_published_before_it_existed(redis: Redis, keys: Keys, ann: Completions) -> None:
    there = await publish(redis, keys, 2)
    await ann.ensure_group()
    found = await ann.read(block_ms=1)
    assert ids(found) == there
    assert found[0].fields[b"payload"] == started().encode()


async def test_a_group_can_be_ensured_twice_and_keeps_its_place(redis: Redis, keys: Keys, ann: Completions) -> None:
    await ann.ensure_group()
    there = await publish(redis, keys)
    await ann.ack(ids(await ann.read(block_ms=1)))
    await ann.ensure_group()
    assert await ann.read(block_ms=1) == []
    assert await redis.xlen(keys.completions) == len(there)


async def test_two_listeners_of_a_group_share_and_two_groups_each_get_all(
    redis: Redis, keys: Keys, ann: Completions, bob: Completions, audit: Completions
) -> None:
    await ann.ensure_group()
    await audit.ensure_group()
    there = await publish(redis, keys, 150)
    first, second = await ann.read(block_ms=1), await bob.read(block_ms=1)
    assert (len(first), len(second)) == (100, 50)
    assert ids(first) + ids(second) == there
    assert len(await audit.read(block_ms=1)) == 100


async def test_what_is_not_acknowledged_comes_again_after_reread_and_nothing_else_does(
    redis: Redis, keys: Keys, ann: Completions
) -> None:
    await ann.ensure_group()
    there = await publish(redis, keys, 2)
    assert ids(await ann.read(block_ms=1)) == there
    assert await ann.read(block_ms=1) == []
    later = await publish(redis, keys)
    ann.reread()
    assert ids(await ann.read(block_ms=1)) == there
    await ann.ack(there)
    assert ids(await ann.read(block_ms=1)) == later


async def test_entries_that_were_delivered_before_a_start_under_the_same_name_come_first(
    redis: Redis, keys: Keys, ann: Completions
) -> None:
    await ann.ensure_group()
    there = await publish(redis, keys)
    await ann.read(block_ms=1)
    await publish(redis, keys)
    reborn = Completions(redis, redis, keys, "listeners", "ann")
    assert ids(await reborn.read(block_ms=1)) == there


async def test_a_read_that_failed_begins_with_what_it_may_have_lost(redis: Redis, keys: Keys, ann: Completions) -> None:
    await ann.ensure_group()
    await ann.read(block_ms=1)
    [lost] = await publish(redis, keys)
    # delivered to ann, and the reply never arrived
    await redis.xreadgroup("listeners", "ann", {keys.completions: ">"})
    await redis.rename(keys.completions, keys.completions + "-away")
    await redis.set(keys.completions, "not a stream")
    with pytest.raises(Exception, match="WRONGTYPE"):
        await ann.read(block_ms=1)
    await redis.rename(keys.completions + "-away", keys.completions)
    assert ids(await ann.read(block_ms=1)) == [lost]


async def test_a_flushed_group_is_created_again_and_reading_goes_on(redis: Redis, keys: Keys, ann: Completions) -> None:
    await ann.ensure_group()
    await publish(redis, keys)
    await ann.read(block_ms=1)
    await redis.delete(keys.completions)
    there = await publish(redis, keys)
    assert await ann.read(block_ms=1) == []
    assert ids(await ann.read(block_ms=1)) == there


async def test_reclaiming_from_a_group_that_is_gone_creates_it(redis: Redis, keys: Keys, ann: Completions) -> None:
    assert await ann.reclaim() == []
    there = await publish(redis, keys)
    assert ids(await ann.read(block_ms=1)) == there


async def test_only_entries_that_their_owner_left_lying_are_reclaimed(
    redis: Redis, keys: Keys, ann: Completions, bob: Completions
) -> None:
    await ann.ensure_group()
    there = await publish(redis, keys, 3)
    await ann.read(block_ms=1)
    assert await bob.reclaim() == []
    await age(redis, keys, "ann", there[:2])
    assert ids(await bob.reclaim()) == there[:2]
    assert await bob.reclaim() == []  # bob has them now
    ann.reread()
    assert ids(await ann.read(block_ms=1)) == there[2:]


async def test_reclaiming_finds_entries_far_behind_those_of_the_living(
    redis: Redis, keys: Keys, ann: Completions, bob: Completions
) -> None:
    await ann.ensure_group()
    there = await publish(redis, keys, 1300)
    for _ in range(13):
        await ann.read(block_ms=1)
    await age(redis, keys, "ann", there[-1:])
    assert ids(await bob.reclaim()) == there[-1:]


async def test_a_deleted_entry_that_is_still_pending_is_acknowledged_by_who_reclaims_it(
    redis: Redis, keys: Keys, ann: Completions, bob: Completions
) -> None:
    await ann.ensure_group()
    there = await publish(redis, keys, 2)
    await ann.read(block_ms=1)
    await redis.xdel(keys.completions, there[0])
    await age(redis, keys, "ann", there)
    assert await bob.read(block_ms=1) == []  # bob had nothing pending of his own
    assert ids(await bob.reclaim()) == there[1:]
    await bob.ack(there[1:])
    assert await bob.read(block_ms=1) == []
    assert await pending(redis, keys) == 0


async def test_deleted_entries_among_our_own_do_not_hide_what_is_behind_them(
    redis: Redis, keys: Keys, ann: Completions
) -> None:
    await ann.ensure_group()
    there = await publish(redis, keys, 101)
    await ann.read(block_ms=1)
    await ann.read(block_ms=1)
    await redis.xdel(keys.completions, *there[:100])
    ann.reread()
    assert ids(await ann.read(block_ms=1)) == there[100:]
    assert await pending(redis, keys) == 1


async def test_without_a_stream_or_a_group_nothing_is_trimmed(redis: Redis, keys: Keys, ann: Completions) -> None:
    assert await ann.trim() == 0
    assert await redis.exists(keys.completions) == 0
    await publish(redis, keys, 3)
    assert await ann.trim() == 0
    assert await redis.xlen(keys.completions) == 3


async def test_trimming_stops_at_the_oldest_entry_that_is_not_acknowledged(
    redis: Redis, keys: Keys, ann: Completions
) -> None:
    await ann.ensure_group()
    there = await publish(redis, keys, 5)
    assert await ann.trim() == 0  # nothing was delivered yet
    await ann.read(block_ms=1)
    assert await ann.trim() == 0  # delivered, not acknowledged
    await ann.ack([there[0], there[1], there[3]])
    assert await ann.trim() == 2
    assert [entry_id.decode() for entry_id, _ in await entries(redis, keys.completions)] == there[2:]
    await ann.ack([there[2], there[4]])
    assert await ann.trim() == 2  # the last one delivered stays
    assert await redis.xlen(keys.completions) == 1


async def test_entries_of_one_millisecond_are_told_apart_by_their_sequence(
    redis: Redis, keys: Keys, ann: Completions
) -> None:
    await ann.ensure_group()
    for number in range(8, 13):  # 9 comes before 10, which text would not say
        await redis.xadd(keys.completions, {"payload": b"x"}, id=f"1767323045000-{number}")
    await ann.read(block_ms=1)
    await ann.ack(["1767323045000-8", "1767323045000-9"])
    assert await ann.trim() == 2


async def test_milliseconds_are_compared_as_numbers(
    redis: Redis, keys: Keys, ann: Completions, audit: Completions
) -> None:
    await ann.ensure_group()
    await audit.ensure_group()
    for entry_id in ("999-0", "1000-0", "1001-0"):
        await redis.xadd(keys.completions, {"payload": b"x"}, id=entry_id)
    await ann.ack(ids(await ann.read(block_ms=1)))
    await redis.xgroup_setid(keys.completions, "audit", "999-0")
    assert await ann.trim() == 0  # audit's 999-0 is before ann's 1001-0


async def test_the_slowest_group_holds_back_the_trimming_until_it_is_dropped(
    redis: Redis, keys: Keys, ann: Completions, audit: Completions
) -> None:
    await ann.ensure_group()
    await audit.ensure_group()
    await publish(redis, keys, 4)
    await ann.ack(ids(await ann.read(block_ms=1)))
    assert await ann.trim() == 0
    assert await ann.drop_group("audit") is True
    assert await ann.drop_group("audit") is False
    assert await ann.trim() == 3


async def test_dropping_a_group_where_there_is_no_stream_makes_none(redis: Redis, keys: Keys, ann: Completions) -> None:
    assert await ann.drop_group("audit") is False
    assert await redis.exists(keys.completions) == 0


async def test_who_leaves_is_forgotten_unless_entries_are_pending_under_the_name(
    redis: Redis, keys: Keys, ann: Completions, bob: Completions
) -> None:
    await ann.ensure_group()
    await publish(redis, keys)
    await ann.read(block_ms=1)
    await bob.read(block_ms=1)
    await ann.leave()
    await bob.leave()
    assert await pending(redis, keys) == 1
    consumers: Any = await redis.xinfo_consumers(keys.completions, "listeners")
    assert [consumer["name"] for consumer in consumers] == [b"ann"]


async def test_acknowledging_nothing_asks_nothing_of_redis(redis: Redis, keys: Keys, ann: Completions) -> None:
    await ann.ack([])
    assert await redis.exists(keys.completions) == 0
