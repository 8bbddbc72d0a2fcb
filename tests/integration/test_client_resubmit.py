"""The client's later runs on a real Redis: what is taken over, what is signed again, what is refused."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from redis.asyncio import Redis

from demo.servers import RedisServer
from producer.client import AsyncGenerationClient
from producer.errors import JobConflict, JobUnknown, QueueFull, RequestRefused
from producer.jobs import Job
from schemas.entries import RequestEntry, decode_entry
from schemas.keys import JobState, Keys, Priority
from schemas.requests import GenerationRequest
from tests.integration.client_kit import CANARY, FOREIGN_URL, STORAGE, Ender, a_client
from tests.integration.queue_kit import entries


@pytest.fixture
async def client(redis_at: RedisServer, keys: Keys) -> AsyncIterator[AsyncGenerationClient]:
    async with a_client(redis_at.url, keys, storage=STORAGE) as client:
        yield client


def _tomorrow() -> datetime:
    return datetime.now(UTC) + timedelta(days=1)


async def newest(redis: Redis, keys: Keys, priority: Priority = Priority.NORMAL) -> RequestEntry:
    [*_, (_, fields)] = await entries(redis, keys.requests(priority))
    return decode_entry(fields)


async def test_a_failed_job_gets_its_next_run_with_the_same_request_and_priority(
    client: AsyncGenerationClient, redis: Redis, keys: Keys, ann: Ender
) -> None:
    await client.submit(job_id="job-1", prompt="a fox", steps=30, priority=Priority.HIGH)
    await ann.fail_next()
    assert await client.resubmit("job-1") == Job("job-1", 2, JobState.QUEUED, duplicate=False)
    entry = await newest(redis, keys, Priority.HIGH)
    assert (entry.run, entry.request) == (2, GenerationRequest(job_id="job-1", prompt="a fox", steps=30))


async def test_a_cancelled_job_gets_its_next_run(client: AsyncGenerationClient) -> None:
    await client.submit(job_id="job-1", prompt="a fox")
    await client.cancel("job-1")
    assert (await client.resubmit("job-1")).run == 2


async def test_a_second_resubmission_finds_the_run_of_the_first(client: AsyncGenerationClient, ann: Ender) -> None:
    await client.submit(job_id="job-1", prompt="a fox")
    await ann.fail_next()
    await client.resubmit("job-1", steps=30)
    assert await client.resubmit("job-1", steps=30) == Job("job-1", 2, JobState.QUEUED, duplicate=True)
    await ann.succeed_next(run=2)
    assert await client.resubmit("job-1", steps=30) == Job("job-1", 2, JobState.SUCCEEDED, duplicate=True)
    assert await client.resubmit("job-1", run=2) == Job("job-1", 2, JobState.SUCCEEDED, duplicate=True)


@pytest.mark.parametrize("ends", [False, True])
async def test_a_live_or_succeeded_job_is_a_duplicate_even_where_a_next_run_would_need_a_fresh_url(
    client: AsyncGenerationClient, ann: Ender, redis: Redis, keys: Keys, ends: bool
) -> None:
    await client.submit(job_id="job-1", prompt="a fox", lora_url=f"{FOREIGN_URL}?{CANARY}", expires_at=_tomorrow())
    if ends:
        await ann.succeed_next()
    client._now = lambda: _tomorrow() + timedelta(days=1)
    state = JobState.SUCCEEDED if ends else JobState.QUEUED
    for run in (None, 1):
        assert await client.resubmit("job-1", run=run) == Job("job-1", 1, state, duplicate=True)
    assert len(await entries(redis, keys.requests(Priority.NORMAL))) == (0 if ends else 1)


async def test_a_resubmission_of_a_job_that_waits_wakes_the_consumers_again(redis_at: RedisServer, keys: Keys) -> None:
    woken: list[str] = []

    async def wake() -> None:
        woken.append("woken")

    async with a_client(redis_at.url, keys, wake=wake) as client:
        await client.submit(job_id="job-1", prompt="a fox")
        await client.resubmit("job-1")
    assert len(woken) == 2


@pytest.mark.parametrize("ends", [False, True])
async def test_a_live_or_succeeded_job_is_not_turned_into_another_one(
    client: AsyncGenerationClient, ann: Ender, ends: bool
) -> None:
    await client.submit(job_id="job-1", prompt="a fox")
    if ends:
        await ann.succeed_next()
    with pytest.raises(JobConflict):
        await client.resubmit("job-1", prompt="a cat")
    with pytest.raises(JobConflict, match="run 1"):
        await client.resubmit("job-1", run=2)


async def test_own_urls_are_signed_again(client: AsyncGenerationClient, redis: Redis, keys: Keys, ann: Ender) -> None:
    lora, png = STORAGE.lora_url("loras/ä b.safetensors", 1), STORAGE.upload_url("out/x.png", 1)
    await client.submit(job_id="job-1", prompt="a fox", lora_url=lora, upload_url=png)
    await ann.fail_next()
    await client.resubmit("job-1")
    request = (await newest(redis, keys)).request
    assert request is not None
    for url, key in ((request.lora_url, "loras/ä b.safetensors"), (request.upload_url, "out/x.png")):
        assert url is not None
        assert STORAGE.owns(url) == key
        assert "X-Amz-Expires=3600" in url


async def test_several_own_loras_are_signed_again_and_keys_need_no_signature(
    client: AsyncGenerationClient, redis: Redis, keys: Keys, ann: Ender
) -> None:
    loras: list[Any] = [{"url": STORAGE.lora_url("a.safetensors", 1), "scale": 0.5}, {"key": "b.safetensors"}]
    await client.submit(job_id="job-1", prompt="a fox", loras=loras)
    await ann.fail_next()
    await client.resubmit("job-1")
    request = (await newest(redis, keys)).request
    assert request is not None
    assert "X-Amz-Expires=3600" in (request.loras[0].url or "")
    assert (request.loras[0].scale, request.loras[1].key) == (0.5, "b.safetensors")


@pytest.mark.parametrize(
    ("fields", "lost"),
    [
        ({"lora_url": f"{FOREIGN_URL}?{CANARY}"}, "lora_url"),
        ({"upload_url": f"https://files.example/x.png?{CANARY}"}, "upload_url"),
        ({"loras": [{"key": "a"}, {"url": f"{FOREIGN_URL}?{CANARY}"}]}, "loras.1.url"),
    ],
)
async def test_a_foreign_url_without_its_signature_is_refused_by_name(
    client: AsyncGenerationClient, ann: Ender, fields: Any, lost: str
) -> None:
    await client.submit(job_id="job-1", prompt="a fox", **fields)
    await ann.fail_next()
    with pytest.raises(RequestRefused, match="fresh") as caught:
        await client.resubmit("job-1")
    assert (caught.value.details, caught.value.job_id) == ({"field": lost}, "job-1")
    assert "canary" not in str(caught.value)
    assert (await client.status("job-1")).run == 1


async def test_a_fresh_foreign_url_is_taken_as_it_is(
    client: AsyncGenerationClient, redis: Redis, keys: Keys, ann: Ender
) -> None:
    await client.submit(job_id="job-1", prompt="a fox", lora_url=f"{FOREIGN_URL}?sig=1", lora_scale=0.5)
    await ann.fail_next()
    await client.resubmit("job-1", lora_url=f"{FOREIGN_URL}?sig=2")
    request = (await newest(redis, keys)).request
    assert request is not None
    assert (request.lora_url, request.lora_scale) == (f"{FOREIGN_URL}?sig=2", 0.5)


async def test_a_lora_in_the_own_bucket_replaces_one_behind_a_url(
    client: AsyncGenerationClient, redis: Redis, keys: Keys, ann: Ender
) -> None:
    await client.submit(job_id="job-1", prompt="a fox", lora_url=f"{FOREIGN_URL}?sig=1")
    await ann.fail_next()
    await client.resubmit("job-1", lora_key="cat.safetensors")
    request = (await newest(redis, keys)).request
    assert request is not None
    assert (request.lora_url, request.lora_key) == (None, "cat.safetensors")


async def test_a_time_limit_that_has_passed_must_be_replaced(client: AsyncGenerationClient, ann: Ender) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=0.5)
    await client.submit(job_id="job-1", prompt="a fox", expires_at=soon)
    await ann.fail_next()
    client._now = lambda: soon
    with pytest.raises(RequestRefused, match="expires_at") as caught:
        await client.resubmit("job-1")
    assert caught.value.details == {"field": "expires_at"}
    assert (await client.resubmit("job-1", expires_at=None)).run == 2


async def test_a_bad_request_is_mended_by_changes(
    client: AsyncGenerationClient, redis: Redis, keys: Keys, ann: Ender
) -> None:
    await redis.xadd(keys.requests(Priority.NORMAL), {"payload": b'{"job_id":"job-1","prompt":"a fox","steps":3}'})
    lease, begun = await ann.begin(await ann.read_one())
    assert begun.verdict == "refused"
    await ann.fail(lease)
    await redis.hset(keys.job("job-1"), "payload", b'{"job_id":"job-1","prompt":"a fox","steps":3}')
    with pytest.raises(RequestRefused, match="steps"):
        await client.resubmit("job-1")
    assert (await client.resubmit("job-1", steps=20)).run == 2


async def test_a_request_that_cannot_be_read_has_to_be_given_anew(
    client: AsyncGenerationClient, redis: Redis, keys: Keys, ann: Ender
) -> None:
    await client.submit(job_id="job-1", prompt="a fox")
    await ann.fail_next()
    await redis.hset(keys.job("job-1"), "payload", b"\xff")
    with pytest.raises(RequestRefused, match="whole request"):
        await client.resubmit("job-1", steps=30)
    whole = GenerationRequest(job_id="job-1", prompt="a cat")
    assert (await client.resubmit("job-1", request=whole)).run == 2
    assert (await newest(redis, keys)).request == whole


async def test_a_job_that_redis_has_forgotten_goes_on_at_the_given_run(
    client: AsyncGenerationClient, redis: Redis, keys: Keys
) -> None:
    request = GenerationRequest(job_id="job-1", prompt="a fox")
    with pytest.raises(JobUnknown):
        await client.resubmit("job-1", request=request)
    assert (await client.resubmit("job-1", request=request, run=4, priority=Priority.LOW)).run == 4
    assert (await newest(redis, keys, Priority.LOW)).run == 4
    with pytest.raises(RequestRefused, match="job-2"):
        await client.resubmit("job-2", request=request, run=2)


async def test_a_full_queue_takes_no_later_run_either(redis_at: RedisServer, keys: Keys, ann: Ender) -> None:
    async with a_client(redis_at.url, keys, max_queue=1) as client:
        await client.submit(job_id="job-1", prompt="a fox")
        await ann.fail_next()
        await client.submit(job_id="job-2", prompt="a fox")
        with pytest.raises(QueueFull):
            await client.resubmit("job-1")
