"""The consumer's scripts on a real Redis: begin, start, progress, finish, retry, release."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from redis.asyncio import Redis

from consumer.queue import Held, Lease, connect
from demo.servers import redis_server
from schemas.keys import CONSUMER_GROUP, JobState, Keys, Priority
from tests.integration.queue_kit import (
    FakeConsumer,
    a_request,
    cancelled,
    completions,
    entries,
    failed,
    job,
    let_lease_run_out,
    publish,
    retrying,
    started,
    where_is,
)


async def test_a_bare_xadd_becomes_a_job_with_a_hash_when_it_is_begun(
    redis: Redis, keys: Keys, ann: FakeConsumer
) -> None:
    entry_id = await publish(redis, keys, a_request(), Priority.LOW)
    lease, begun = await ann.take()
    assert (begun.verdict, begun.attempt) == ("ok", 1)
    held = await job(redis, keys)
    assert held["state"] == "preparing"
    assert (held["run"], held["attempt"], held["priority"]) == ("1", "1", "low")
    assert (held["entry_id"], held["consumer"]) == (entry_id, "ann")
    assert held["submitted_at"] == entry_id.split("-")[0]
    assert lease.job_id == "job-1"


async def test_a_finished_run_leaves_the_stream_and_publishes_one_event(
    redis: Redis, keys: Keys, ann: FakeConsumer
) -> None:
    await publish(redis, keys, a_request())
    lease, _ = await ann.take()
    assert await ann.leases.start(lease, started(lease)) is Held.OK
    assert (await job(redis, keys))["state"] == "running"
    assert await ann.fail(lease, dead=False) == Held.OK
    assert await redis.xlen(keys.requests(Priority.NORMAL)) == 0
    assert (await redis.xpending(keys.requests(Priority.NORMAL), CONSUMER_GROUP))["pending"] == 0
    assert [event["type"] for event in await completions(redis, keys)] == ["generation.started", "generation.failed"]
    held = await job(redis, keys)
    assert (held["state"], held["consumer"]) == ("failed", "")
    assert 0 < await redis.pttl(keys.job("job-1")) <= 60_000


async def test_a_finish_that_is_sent_twice_publishes_once(redis: Redis, keys: Keys, ann: FakeConsumer) -> None:
    await publish(redis, keys, a_request())
    lease, _ = await ann.take()
    assert await ann.fail(lease) == Held.OK
    assert await ann.fail(lease) == Held.OK
    assert len(await completions(redis, keys)) == 1
    assert await redis.xlen(keys.dead) == 1


async def test_a_begin_that_is_sent_twice_counts_one_attempt(redis: Redis, keys: Keys, ann: FakeConsumer) -> None:
    await publish(redis, keys, a_request())
    delivery = await ann.read_one()
    lease, first = await ann.begin(delivery)
    _, again = await ann.begin(delivery, lease)
    assert (again.verdict, again.attempt) == (first.verdict, first.attempt) == ("ok", 1)


async def test_a_start_that_is_sent_twice_publishes_once(redis: Redis, keys: Keys, ann: FakeConsumer) -> None:
    await publish(redis, keys, a_request())
    lease, _ = await ann.take()
    for _ in range(2):
        assert await ann.leases.start(lease, started(lease)) is Held.OK
    assert len(await completions(redis, keys)) == 1


async def test_the_terminal_event_is_copied_to_the_jobs_progress(redis: Redis, keys: Keys, ann: FakeConsumer) -> None:
    await publish(redis, keys, a_request())
    lease, _ = await ann.take()
    assert await ann.leases.progress(lease, 3, 20, 1.5) is Held.OK
    await ann.fail(lease)
    [(_, step), (_, event)] = await entries(redis, keys.progress("job-1"))
    assert step == {b"step": b"3", b"total": b"20", b"eta_s": b"1.500"}
    assert event[b"type"] == b"generation.failed"
    assert event[b"payload"] == failed(lease).encode()
    assert await redis.ttl(keys.progress("job-1")) > 0


async def test_a_consumer_that_lost_its_lease_can_do_nothing(
    redis: Redis, keys: Keys, ann: FakeConsumer, bob: FakeConsumer
) -> None:
    await publish(redis, keys, a_request())
    lost, _ = await ann.take()
    await let_lease_run_out(redis, keys, lost.delivery, "ann")
    [delivery] = await bob.intake.reclaim(())
    # Bob has the entry and has not begun: already nothing of Ann's passes
    assert await ann.leases.extend(lost) is Held.LOST
    assert await ann.leases.start(lost, started(lost)) is Held.LOST
    assert await ann.fail(lost) == Held.LOST
    owned, begun = await bob.begin(delivery)
    assert (begun.verdict, begun.attempt, begun.state) == ("ok", 2, JobState.PREPARING)
    assert await ann.fail(lost) == Held.LOST
    assert await ann.leases.progress(lost, 1, 20, 0.0) is Held.LOST
    assert await ann.leases.retry(lost, retrying(lost), 0.1) is Held.LOST
    assert await ann.leases.release(lost) is Held.LOST
    assert await ann.leases.note_upload(lost, b"{}") is None
    assert await bob.fail(owned, attempt=2) == Held.OK
    assert [event["data"]["attempt"] for event in await completions(redis, keys)] == [2]


async def test_a_consumer_frozen_beyond_its_lease_is_fenced_from_its_own_second_attempt(
    redis: Redis, keys: Keys, ann: FakeConsumer
) -> None:
    await publish(redis, keys, a_request())
    first, _ = await ann.take()
    await let_lease_run_out(redis, keys, first.delivery, "ann")
    [delivery] = await ann.intake.reclaim(())
    second, begun = await ann.begin(delivery)
    assert begun.attempt == 2
    assert await ann.fail(first) == Held.LOST
    assert await ann.fail(second, attempt=2) == Held.OK


async def test_an_entry_that_was_taken_over_before_it_was_begun_is_not_begun(
    redis: Redis, keys: Keys, ann: FakeConsumer, bob: FakeConsumer
) -> None:
    await publish(redis, keys, a_request())
    delivery = await ann.read_one()
    await let_lease_run_out(redis, keys, delivery, "ann")
    assert len(await bob.intake.reclaim(())) == 1
    _, begun = await ann.begin(delivery)
    assert begun.verdict == "lost"
    assert await job(redis, keys) == {}


async def test_a_renewal_of_an_earlier_attempt_is_refused_to_its_own_consumer_too(
    redis: Redis, keys: Keys, ann: FakeConsumer
) -> None:
    await publish(redis, keys, a_request())
    first, _ = await ann.take()
    second, _ = await ann.begin(first.delivery)
    assert await ann.leases.extend(first) is Held.LOST
    assert await ann.leases.extend(second) is Held.OK


async def test_renewal_keeps_an_entry_from_being_reclaimed(
    redis: Redis, keys: Keys, ann: FakeConsumer, bob: FakeConsumer
) -> None:
    await publish(redis, keys, a_request())
    lease, _ = await ann.take()
    await let_lease_run_out(redis, keys, lease.delivery, "ann")
    assert await ann.leases.extend(lease) is Held.OK
    assert await bob.intake.reclaim(()) == []


async def test_a_retried_run_waits_and_comes_back_to_its_own_stream(
    redis: Redis, keys: Keys, ann: FakeConsumer
) -> None:
    await publish(redis, keys, a_request(), Priority.HIGH)
    lease, _ = await ann.take()
    for _ in range(2):  # a lost reply: sent again
        assert await ann.leases.retry(lease, retrying(lease), 0.05) is Held.OK
    assert await where_is(redis, keys) == ["delayed"]
    assert await ann.intake.promote() == 0
    await asyncio.sleep(0.06)
    assert await ann.intake.promote() == 1
    assert await ann.intake.promote() == 0
    assert await where_is(redis, keys) == ["stream"]
    again, begun = await ann.take()
    assert (begun.verdict, begun.attempt, begun.state) == ("ok", 2, JobState.QUEUED)
    assert again.delivery.stream == keys.requests(Priority.HIGH)
    assert [event["type"] for event in await completions(redis, keys)] == ["generation.retrying"]


async def test_a_handed_back_run_keeps_its_place_and_its_attempts(
    redis: Redis, keys: Keys, ann: FakeConsumer, bob: FakeConsumer
) -> None:
    await publish(redis, keys, a_request())
    lease, _ = await ann.take()
    assert await ann.leases.release(lease) is Held.OK
    held = await job(redis, keys)
    assert (held["state"], held["attempt"], held["consumer"]) == ("queued", "0", "")
    assert held["handbacks"] == "1"
    [delivery] = await bob.intake.reclaim(())  # at once: nobody waits for a lease to run out
    assert delivery.entry_id == lease.delivery.entry_id
    _, begun = await bob.begin(delivery)
    assert (begun.verdict, begun.attempt) == ("ok", 1)


async def test_a_begin_that_arrives_a_second_time_after_its_hand_back_counts_again(
    redis: Redis, keys: Keys, ann: FakeConsumer
) -> None:
    """Guards that RELEASE forgets its lease's `begun`: what it counted was taken back."""
    await publish(redis, keys, a_request())
    lease, _ = await ann.take()
    await ann.leases.release(lease)
    [delivery] = await ann.intake.reclaim(())
    _, again = await ann.begin(delivery, lease)
    assert (again.verdict, again.attempt) == ("ok", 1)


async def test_an_attempt_that_is_made_again_after_a_hand_back_is_announced_once(
    redis: Redis, keys: Keys, ann: FakeConsumer, bob: FakeConsumer
) -> None:
    """Guards `started` in START: an uncounted attempt's number comes again, and with it the event's id."""
    await publish(redis, keys, a_request())
    lease, _ = await ann.take()
    assert await ann.leases.start(lease, started(lease)) is Held.OK
    await ann.leases.release(lease)
    [delivery] = await bob.intake.reclaim(())
    again, begun = await bob.begin(delivery)
    assert (begun.attempt, await bob.leases.start(again, started(again))) == (1, Held.OK)
    assert (await job(redis, keys))["state"] == "running"
    assert [event["type"] for event in await completions(redis, keys)] == ["generation.started"]


async def test_a_job_that_kills_its_consumers_ends_without_being_run_again(
    redis: Redis, keys: Keys, ann: FakeConsumer
) -> None:
    await publish(redis, keys, a_request())
    lease, begun = await ann.take()
    for attempt in (1, 2, 3):
        assert (begun.verdict, begun.attempt) == ("ok", attempt)
        await let_lease_run_out(redis, keys, lease.delivery, "ann")
        [delivery] = await ann.intake.reclaim(())
        lease, begun = await ann.begin(delivery)
    assert (begun.verdict, begun.attempt) == ("exhausted", 3)
    assert (await job(redis, keys))["crashes"] == "3"
    assert await ann.fail(lease, attempt=3) == Held.OK
    [(_, letter)] = await entries(redis, keys.dead)
    assert (letter[b"job_id"], letter[b"run"], letter[b"attempts"]) == (b"job-1", b"1", b"3")
    assert letter[b"source"] == keys.requests(Priority.NORMAL).encode()
    assert set(letter) == {b"job_id", b"run", b"payload", b"event", b"attempts", b"source", b"died_at"}


async def test_a_request_that_expired_before_its_first_attempt_is_not_begun(
    redis: Redis, keys: Keys, ann: FakeConsumer
) -> None:
    await publish(redis, keys, a_request(expires_at=datetime.now(UTC) - timedelta(seconds=5)))
    _, begun = await ann.take()
    assert (begun.verdict, begun.attempt) == ("expired", 0)


async def test_a_request_that_expires_after_its_first_attempt_goes_on(
    redis: Redis, keys: Keys, ann: FakeConsumer
) -> None:
    await publish(redis, keys, a_request(expires_at=datetime.now(UTC) + timedelta(milliseconds=80)))
    lease, begun = await ann.take()
    assert begun.verdict == "ok"
    await ann.leases.retry(lease, retrying(lease), 0.1)
    await asyncio.sleep(0.12)
    await ann.intake.promote()
    _, begun = await ann.take()
    assert (begun.verdict, begun.attempt) == ("ok", 2)


@pytest.mark.parametrize("stage", ["queued", "delayed"])
async def test_a_cancelled_job_ends_where_it_is_reached(
    redis: Redis, keys: Keys, ann: FakeConsumer, stage: str
) -> None:
    await publish(redis, keys, a_request())
    if stage == "delayed":
        lease, _ = await ann.take()
        await ann.leases.retry(lease, retrying(lease), 0.0)
    await redis.set(keys.cancel("job-1"), 1, ex=604800)
    await asyncio.sleep(0.002)
    await ann.intake.promote()
    lease, begun = await ann.take()
    assert (begun.verdict, begun.state) == ("cancelled", JobState(stage))
    assert await ann.leases.finish(lease, JobState.CANCELLED, cancelled(lease), b"{}", dead=False) is Held.OK
    assert await redis.exists(keys.cancel("job-1")) == 0


async def test_renewal_start_and_progress_tell_of_a_cancellation(redis: Redis, keys: Keys, ann: FakeConsumer) -> None:
    await publish(redis, keys, a_request())
    lease, _ = await ann.take()
    await redis.set(keys.cancel("job-1"), 1)
    assert await ann.leases.extend(lease) is Held.CANCEL
    assert await ann.leases.start(lease, started(lease)) is Held.CANCEL
    assert await ann.leases.progress(lease, 1, 20, 0.0) is Held.CANCEL


async def test_an_invalid_entry_is_owned_without_counting_an_attempt(
    redis: Redis, keys: Keys, ann: FakeConsumer
) -> None:
    await redis.xadd(keys.requests(Priority.NORMAL), {"payload": '{"job_id":"job-1"}'})
    lease, begun = await ann.take()
    assert (begun.verdict, begun.attempt) == ("refused", 0)
    assert await ann.fail(lease, attempt=0, dead=False) == Held.OK
    assert await where_is(redis, keys) == ["done"]


async def test_uploads_that_cannot_be_read_back_are_noted_for_later_attempts_and_runs(
    redis: Redis, keys: Keys, ann: FakeConsumer
) -> None:
    await publish(redis, keys, a_request())
    first, _ = await ann.take()
    for _ in range(2):  # a lost reply: our own note is not taken for another's
        assert await ann.leases.note_upload(first, b"one") == []
    second, _ = await ann.begin(first.delivery)
    assert await ann.leases.note_upload(second, b"two") == [b"one"]
    await ann.fail(second)
    await publish(redis, keys, a_request(), run=2)
    third, _ = await ann.take()
    assert await ann.leases.note_upload(third, b"three") == [b"one", b"two"]


async def test_entries_with_one_id_in_two_streams_are_two_entries(redis: Redis, keys: Keys, ann: FakeConsumer) -> None:
    """An id is unique in its stream alone: two priorities in one millisecond may well share one."""
    for stream in (keys.requests(Priority.HIGH), keys.requests(Priority.NORMAL)):
        await redis.xadd(stream, {"payload": a_request().encode()}, id="1700000000000-0")
    owner, begun = await ann.take()
    assert begun.verdict == "ok"
    assert (await ann.take())[1].verdict == "duplicate"
    assert await ann.leases.extend(owner) is Held.OK


@pytest.mark.parametrize("step", ["start", "retry", "release", "finish", "extend"])
async def test_a_full_redis_keeps_no_begun_job_from_going_on(tmp_path: Path, keys: Keys, step: str) -> None:
    """At maxmemory Redis refuses scripts whose first write needs memory, and lets others go on."""
    with redis_server(tmp_path) as server:
        redis = connect(server.url)
        ann = FakeConsumer(redis, keys, "ann")
        await publish(redis, keys, a_request())
        lease, _ = await ann.take()
        await redis.config_set("maxmemory", "1")
        match step:
            case "start":
                held = await ann.leases.start(lease, started(lease))
            case "retry":
                held = await ann.leases.retry(lease, retrying(lease), 1.0)
            case "release":
                held = await ann.leases.release(lease)
            case "extend":
                held = await ann.leases.extend(lease)
            case _:
                held = Held(await ann.fail(lease))
        assert held is Held.OK
        await redis.aclose()


async def exhaust(redis: Redis, keys: Keys, ann: FakeConsumer, bob: FakeConsumer) -> tuple[Lease, Lease]:
    """Ann dies on a job's only attempt; Bob is told that there are no more, and has not ended the run. Their leases."""
    ann.max_attempts = bob.max_attempts = 1
    await publish(redis, keys, a_request())
    lost, _ = await ann.take()
    await let_lease_run_out(redis, keys, lost.delivery, "ann")
    [delivery] = await bob.intake.reclaim(())
    lease, begun = await bob.begin(delivery)
    assert begun.verdict == "exhausted"
    return lost, lease


async def test_a_begin_that_was_refused_more_attempts_is_refused_again_when_it_is_sent_twice(
    redis: Redis, keys: Keys, ann: FakeConsumer, bob: FakeConsumer
) -> None:
    """Guards `last.begun == lease` in BEGIN: the lease alone does not say that its attempt was counted."""
    _, lease = await exhaust(redis, keys, ann, bob)
    _, again = await bob.begin(lease.delivery, lease)
    assert again.verdict == "exhausted"


async def test_handing_back_a_run_without_attempts_left_uncounts_nothing(
    redis: Redis, keys: Keys, ann: FakeConsumer, bob: FakeConsumer
) -> None:
    """Guards `held[2] == lease` in RELEASE: a drain may come between the verdict and the end of the run."""
    _, lease = await exhaust(redis, keys, ann, bob)
    assert await bob.leases.release(lease) is Held.OK
    [delivery] = await ann.intake.reclaim(())
    assert (await ann.begin(delivery))[1].verdict == "exhausted"


async def test_a_begin_that_was_counted_is_known_when_another_that_counted_nothing_was_handed_back(
    redis: Redis, keys: Keys, ann: FakeConsumer, bob: FakeConsumer
) -> None:
    """Guards that RELEASE forgets no `begun` but its own lease's: a call of Ann's that was sent twice arrives late."""
    lost, lease = await exhaust(redis, keys, ann, bob)
    assert await bob.leases.release(lease) is Held.OK
    [delivery] = await ann.intake.reclaim(())
    _, again = await ann.begin(delivery, lost)
    assert (again.verdict, again.attempt) == ("ok", 1)


async def test_a_begin_that_arrives_a_second_time_after_the_start_changes_nothing(
    redis: Redis, keys: Keys, ann: FakeConsumer
) -> None:
    await publish(redis, keys, a_request())
    lease, _ = await ann.take()
    await ann.leases.start(lease, started(lease))
    before = await job(redis, keys)
    _, late = await ann.begin(lease.delivery, lease)
    assert (late.verdict, late.attempt) == ("ok", 1)
    assert await job(redis, keys) == before
