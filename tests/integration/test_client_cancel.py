"""The client's cancellations on a real Redis, wherever the job is."""

from typing import Any

import pytest
from redis.asyncio import Redis

from producer.client import AsyncGenerationClient
from producer.errors import JobUnknown
from producer.jobs import CancelOutcome, CancelVerdict
from schemas.keys import JobState, Keys
from schemas.requests import GenerationRequest
from tests.integration.client_kit import CANARY, FOREIGN_URL, Ender
from tests.integration.queue_kit import completions, job, let_lease_run_out, publish, retrying, where_is


async def test_a_queued_job_is_cancelled_at_once_and_keeps_no_signature(
    client: AsyncGenerationClient, redis: Redis, keys: Keys
) -> None:
    url = f"{FOREIGN_URL}?{CANARY}"
    await client.submit(job_id="job-1", prompt="a fox", lora_url=url, metadata={"user": 7})
    outcome = await client.cancel("job-1")
    assert outcome == CancelOutcome("job-1", CancelVerdict.CANCELLED, JobState.QUEUED)
    assert await where_is(redis, keys) == ["done"]
    [event] = await completions(redis, keys)
    assert (event["id"], event["data"]["stage"]) == ("job-1:1:cancelled", "queued")
    assert (event["data"]["attempt"], event["data"]["request_metadata"]) == (0, {"user": 7})
    assert "canary" not in str(await job(redis, keys))


async def test_a_delayed_job_is_cancelled_at_once(
    client: AsyncGenerationClient, redis: Redis, keys: Keys, ann: Ender
) -> None:
    await client.submit(job_id="job-1", prompt="a fox")
    lease, _ = await ann.run_next()
    await ann.leases.retry(lease, retrying(lease), 60)
    assert await client.cancel("job-1") == CancelOutcome("job-1", CancelVerdict.CANCELLED, JobState.DELAYED)
    assert await where_is(redis, keys) == ["done"]
    event = (await completions(redis, keys))[-1]
    assert (event["data"]["stage"], event["data"]["attempt"]) == ("delayed", 1)


async def test_a_delayed_job_that_is_back_in_its_stream_leaves_no_entry_there(
    client: AsyncGenerationClient, redis: Redis, keys: Keys, ann: Ender
) -> None:
    await client.submit(job_id="job-1", prompt="a fox")
    lease, _ = await ann.run_next()
    await ann.leases.retry(lease, retrying(lease), 0)
    await redis.set(keys.cancel("job-1"), 1)  # what another backend asked for; the job is called delayed from here on
    while await redis.zcard(keys.delayed):
        await ann.intake.promote()
    assert (await client.status("job-1")).state == JobState.DELAYED
    assert (await client.cancel("job-1")).verdict == CancelVerdict.CANCELLED
    assert await where_is(redis, keys) == ["done"]


async def test_a_running_job_is_asked_to_stop(
    client: AsyncGenerationClient, redis: Redis, keys: Keys, ann: Ender
) -> None:
    await client.submit(job_id="job-1", prompt="a fox")
    lease, _ = await ann.run_next()
    assert await client.cancel("job-1") == CancelOutcome("job-1", CancelVerdict.ASKED, JobState.RUNNING)
    assert await ann.leases.progress(lease, 1, 28, 1.0) == "cancel"


@pytest.mark.parametrize("state", ["queued", "delayed", "preparing", "running", "succeeded", "failed", "cancelled"])
async def test_a_cancellation_says_what_it_found(
    client: AsyncGenerationClient, redis: Redis, keys: Keys, ann: Ender, state: str
) -> None:
    await client.submit(job_id="job-1", prompt="a fox")
    match state:
        case "delayed":
            lease, _ = await ann.take_next()
            await ann.leases.retry(lease, retrying(lease), 60)
        case "preparing":
            await ann.take_next()
        case "running":
            await ann.run_next()
        case "succeeded":
            await ann.succeed_next()
        case "failed":
            await ann.fail_next()
        case "cancelled":
            await client.cancel("job-1")
    ended = len([event for event in await completions(redis, keys) if event["type"] == "generation.cancelled"])
    outcome = await client.cancel("job-1")
    assert outcome.state == state
    at_once, on_a_consumer = ("queued", "delayed"), ("preparing", "running")
    verdict = "cancelled" if state in at_once else "asked" if state in on_a_consumer else "ended"
    assert outcome.verdict == verdict
    assert await redis.exists(keys.cancel("job-1")) == (state in on_a_consumer)
    events = [event for event in await completions(redis, keys) if event["type"] == "generation.cancelled"]
    assert [event["data"]["stage"] for event in events[ended:]] == ([state] if state in at_once else [])


async def test_an_ended_job_is_left_alone_and_no_later_run_is_cancelled_for_it(
    client: AsyncGenerationClient, redis: Redis, keys: Keys, ann: Ender
) -> None:
    await client.submit(job_id="job-1", prompt="a fox")
    await ann.succeed_next()
    assert await client.cancel("job-1") == CancelOutcome("job-1", CancelVerdict.ENDED, JobState.SUCCEEDED)
    assert await client.queue.ask_to_cancel("job-1") == JobState.SUCCEEDED
    assert await redis.exists(keys.cancel("job-1")) == 0


async def test_an_entry_that_was_added_by_hand_is_cancelled_when_a_consumer_reaches_it(
    client: AsyncGenerationClient, redis: Redis, keys: Keys, ann: Ender
) -> None:
    await publish(redis, keys, GenerationRequest(job_id="job-1", prompt="a fox"))
    assert await client.cancel("job-1") == CancelOutcome("job-1", CancelVerdict.ASKED, None)
    _, begun = await ann.begin(await ann.read_one())
    assert begun.verdict == "cancelled"


async def test_an_id_that_cannot_be_one_is_no_key_to_write(
    client: AsyncGenerationClient, redis: Redis, keys: Keys
) -> None:
    with pytest.raises(JobUnknown):
        await client.cancel("a b")
    assert await redis.keys(f"*{keys.prefix}*") == []


async def test_a_job_that_is_begun_between_look_and_cancellation_is_asked_instead(
    client: AsyncGenerationClient, ann: Ender, monkeypatch: pytest.MonkeyPatch
) -> None:
    await client.submit(job_id="job-1", prompt="a fox")
    look = client.queue.job

    async def look_late(job_id: str) -> Any:
        seen = await look(job_id)
        if seen is not None and seen.state == JobState.QUEUED:
            await ann.take_next()
        return seen

    monkeypatch.setattr(client.queue, "job", look_late)
    assert await client.cancel("job-1") == CancelOutcome("job-1", CancelVerdict.ASKED, JobState.PREPARING)


async def test_a_job_that_its_dead_consumer_left_queued_is_not_run_after_its_cancellation(
    client: AsyncGenerationClient, redis: Redis, keys: Keys, ann: Ender
) -> None:
    await client.submit(job_id="job-1", prompt="a fox")
    delivery = await ann.read_one()
    await let_lease_run_out(redis, keys, delivery, "ann")
    assert (await client.cancel("job-1")).verdict == CancelVerdict.CANCELLED
    _, begun = await ann.begin(delivery)
    assert begun.verdict == "lost"
    assert await where_is(redis, keys) == ["done"]
