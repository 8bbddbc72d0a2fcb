"""No priority starves: of every 16 jobs that a consumer takes, one is low's and three are normal's, if there are any.

All of it guards `Intake._order`.
"""

from collections import Counter, deque
from collections.abc import Sequence

from redis.asyncio import Redis

from schemas.keys import Keys, Priority
from tests.integration.queue_kit import FakeConsumer, a_request, let_lease_run_out, publish

URGENT = (Priority.HIGH, Priority.NORMAL)


async def let_all_wait(redis: Redis, keys: Keys, kinds: Sequence[Priority], count: int) -> None:
    for priority in kinds:
        for number in range(count):
            await publish(redis, keys, a_request(f"{priority}-{number}"), priority)


async def taken_under_load(
    redis: Redis, keys: Keys, consumers: Sequence[FakeConsumer], turns: int, load: Sequence[Priority]
) -> list[Priority]:
    """The priorities of what the consumers take in turns, while `load` never runs dry."""
    order = []
    for turn in range(turns):
        for priority in load:
            await publish(redis, keys, a_request(f"{priority}-more-{turn}"), priority)
        delivery = await consumers[turn % len(consumers)].read_one()
        order.append(keys.priority_of(delivery.stream))
    return order


async def test_under_endless_urgent_traffic_one_of_every_16_jobs_is_a_low_one_and_three_are_normal(
    redis: Redis, keys: Keys, ann: FakeConsumer
) -> None:
    await let_all_wait(redis, keys, [Priority.LOW], 6)
    order = await taken_under_load(redis, keys, [ann], 96, URGENT)
    window: deque[Priority] = deque(maxlen=16)
    for priority in order:
        window.append(priority)
        if len(window) == 16:
            assert Counter(window) == {Priority.HIGH: 12, Priority.NORMAL: 3, Priority.LOW: 1}


async def test_a_low_job_is_taken_at_the_latest_with_the_16th_per_job_before_it(
    redis: Redis, keys: Keys, ann: FakeConsumer
) -> None:
    """The bound: the n-th low job is among the next 16 n that a consumer takes, wherever its turn stands."""
    await taken_under_load(redis, keys, [ann], 16, URGENT)
    for already_taken in range(16):
        await taken_under_load(redis, keys, [ann], 1, URGENT)  # its turn is another one each time
        await let_all_wait(redis, keys, [Priority.LOW], 2)
        order = await taken_under_load(redis, keys, [ann], 32, URGENT)
        assert order.count(Priority.LOW) == 2, already_taken
        assert Priority.LOW in order[:16], already_taken


async def test_consumers_side_by_side_each_keep_the_share_however_quick_each_is(
    redis: Redis, keys: Keys, ann: FakeConsumer, bob: FakeConsumer
) -> None:
    """The bound for k consumers: the n-th low job is among the next 16 n + 15 (k - 1) that they take together."""
    await let_all_wait(redis, keys, [Priority.LOW], 10)
    order = await taken_under_load(redis, keys, [ann, ann, bob, ann, ann], 100, URGENT)
    lows = [taken for taken, priority in enumerate(order, start=1) if priority is Priority.LOW]
    assert len(lows) >= 5
    assert all(taken <= 16 * n + 15 for n, taken in enumerate(lows, start=1))


async def test_a_share_that_nobody_wants_goes_to_the_others(redis: Redis, keys: Keys, ann: FakeConsumer) -> None:
    order = await taken_under_load(redis, keys, [ann], 32, [Priority.HIGH])
    assert Counter(order) == {Priority.HIGH: 32}
    low: Sequence[Priority] = [Priority.LOW]
    order = await taken_under_load(redis, keys, [FakeConsumer(redis, keys, "new")], 32, low)
    assert Counter(order) == {Priority.LOW: 32}


async def test_what_dead_consumers_left_is_taken_in_the_same_turns(
    redis: Redis, keys: Keys, ann: FakeConsumer, bob: FakeConsumer
) -> None:
    """Guards the turn in `Intake.reclaim`, too: while more is left than can be taken, none is read."""
    await let_all_wait(redis, keys, list(Priority), 20)
    for _ in range(60):
        await let_lease_run_out(redis, keys, await ann.read_one(), "ann")
    order = [keys.priority_of(delivery.stream) for _ in range(16) for delivery in await bob.intake.reclaim(())]
    assert Counter(order) == {Priority.HIGH: 12, Priority.NORMAL: 3, Priority.LOW: 1}
