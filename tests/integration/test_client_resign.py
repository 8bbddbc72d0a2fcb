"""Waiting with `resign`: a run whose own URL had expired is signed again and submitted again, once."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis

from demo.servers import RedisServer
from producer.client import AsyncGenerationClient
from producer.errors import JobConflict, JobFailed, QueueFull, RequestRefused, WaitTimeout
from schemas.entries import decode_entry
from schemas.errors import ErrorCode
from schemas.keys import JobState, Keys, Priority
from tests.integration.client_kit import CANARY, FOREIGN_URL, PATIENCE_S, STORAGE, Ender, a_client, begun, until
from tests.integration.queue_kit import completions, entries

EXPIRED_LORA = STORAGE.lora_url("loras/cat.safetensors", 1)
EXPIRED_PUT = STORAGE.upload_url("out/x.png", 1)


@pytest.fixture
async def client(redis_at: RedisServer, keys: Keys) -> AsyncIterator[AsyncGenerationClient]:
    async with a_client(redis_at.url, keys, storage=STORAGE) as client:
        yield client


async def run_is_queued(client: AsyncGenerationClient, run: int) -> None:
    async def queued() -> bool:
        status = await client.status("job-1")
        return (status.run, status.state) == (run, JobState.QUEUED)

    await until(queued)


@pytest.mark.parametrize(
    ("fields", "code", "signed"),
    [
        ({"lora_url": EXPIRED_LORA}, ErrorCode.LORA_DOWNLOAD_FAILED, "lora_url"),
        ({"loras": [{"key": "a"}, {"url": EXPIRED_LORA}]}, ErrorCode.LORA_DOWNLOAD_FAILED, None),
        ({"lora_key": "a", "upload_url": EXPIRED_PUT}, ErrorCode.UPLOAD_FAILED, "upload_url"),
    ],
)
async def test_a_run_whose_own_url_had_expired_is_signed_again_and_its_next_run_is_the_result(
    client: AsyncGenerationClient,
    redis: Redis,
    keys: Keys,
    ann: Ender,
    fields: Any,
    code: ErrorCode,
    signed: str | None,
) -> None:
    await client.submit(job_id="job-1", prompt="a fox", priority=Priority.HIGH, **fields)
    result = begun(client.result("job-1", resign=True))
    await ann.expire_next(code=code)
    await run_is_queued(client, 2)
    [(_, entry)] = await entries(redis, keys.requests(Priority.HIGH))
    request = decode_entry(entry).request
    assert request is not None
    assert "X-Amz-Expires=3600" in str(getattr(request, signed) if signed else request.loras[1].url)
    event = await ann.succeed_next(run=2)
    assert await result == event


async def test_a_presigned_key_that_had_expired_is_signed_again(client: AsyncGenerationClient, ann: Ender) -> None:
    await client.submit(job_id="job-1", prompt="a fox", lora_key="cat.safetensors", presign=True)
    await ann.expire_next()
    result = begun(client.result("job-1", resign=True))
    await run_is_queued(client, 2)
    event = await ann.succeed_next(run=2)
    assert await result == event


async def test_it_is_signed_again_once(client: AsyncGenerationClient, ann: Ender) -> None:
    await client.submit(job_id="job-1", prompt="a fox", lora_url=EXPIRED_LORA)
    await ann.expire_next()
    result = begun(client.result("job-1", resign=True))
    await run_is_queued(client, 2)
    await ann.expire_next(run=2)
    with pytest.raises(JobFailed) as caught:
        await result
    assert caught.value.error_code == ErrorCode.LORA_DOWNLOAD_FAILED
    assert (await client.status("job-1")).run == 2


async def test_without_being_asked_for_nothing_is_submitted_again(client: AsyncGenerationClient, ann: Ender) -> None:
    await client.submit(job_id="job-1", prompt="a fox", lora_url=EXPIRED_LORA)
    await ann.expire_next()
    with pytest.raises(JobFailed):
        await client.result("job-1")
    assert (await client.status("job-1")).run == 1


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"lora_url": f"{FOREIGN_URL}?{CANARY}"}, ErrorCode.LORA_DOWNLOAD_FAILED),
        ({"lora_key": "a"}, ErrorCode.LORA_DOWNLOAD_FAILED),
        ({"lora_key": "a", "upload_url": EXPIRED_PUT}, ErrorCode.LORA_DOWNLOAD_FAILED),
        ({"lora_url": EXPIRED_LORA, "upload_url": f"https://x.example/y?{CANARY}"}, ErrorCode.UPLOAD_FAILED),
        ({"lora_url": EXPIRED_LORA}, ErrorCode.TIMEOUT),
    ],
)
async def test_what_no_signature_of_ours_would_help_stays_failed(
    client: AsyncGenerationClient, ann: Ender, fields: Any, code: ErrorCode
) -> None:
    await client.submit(job_id="job-1", prompt="a fox", **fields)
    await ann.expire_next(code=code)
    with pytest.raises(JobFailed) as caught:
        await client.result("job-1", resign=True)
    assert (caught.value.error_code, caught.value.__cause__) == (code, None)
    assert (await client.status("job-1")).run == 1


async def test_a_failure_that_is_no_expiry_stays_one(client: AsyncGenerationClient, ann: Ender) -> None:
    await client.submit(job_id="job-1", prompt="a fox", lora_url=EXPIRED_LORA)
    await ann.fail_next()
    with pytest.raises(JobFailed):
        await client.result("job-1", resign=True)
    assert (await client.status("job-1")).run == 1


async def test_a_client_that_cannot_sign_leaves_it_failed(redis_at: RedisServer, keys: Keys, ann: Ender) -> None:
    async with a_client(redis_at.url, keys) as client:
        await client.submit(job_id="job-1", prompt="a fox", lora_url=EXPIRED_LORA)
        await ann.expire_next()
        with pytest.raises(JobFailed):
            await client.result("job-1", resign=True)


async def test_a_second_url_that_nobody_here_can_sign_is_the_reason_why_not(
    client: AsyncGenerationClient, ann: Ender
) -> None:
    await client.submit(
        job_id="job-1", prompt="a fox", lora_url=EXPIRED_LORA, upload_url=f"https://x.example/y?{CANARY}"
    )
    await ann.expire_next()
    with pytest.raises(JobFailed) as caught:
        await client.result("job-1", resign=True)
    assert caught.value.retry_after == 0
    assert isinstance(caught.value.__cause__, RequestRefused)
    assert "upload_url" in str(caught.value.__cause__)


async def test_a_full_queue_is_the_reason_why_not(redis_at: RedisServer, keys: Keys, ann: Ender) -> None:
    async with a_client(redis_at.url, keys, storage=STORAGE, max_queue=1) as client:
        await client.submit(job_id="job-1", prompt="a fox", lora_url=EXPIRED_LORA)
        await ann.expire_next()
        await client.submit(prompt="another fox")
        with pytest.raises(JobFailed) as caught:
            await client.result("job-1", resign=True)
    assert isinstance(caught.value.__cause__, QueueFull)


async def test_somebody_elses_other_run_is_the_reason_why_not(client: AsyncGenerationClient, ann: Ender) -> None:
    await client.submit(job_id="job-1", prompt="a fox", lora_url=EXPIRED_LORA)
    failed = await ann.expire_next()
    for run in (2, 3):
        await client.resubmit("job-1")
        await ann.expire_next(run=run)
    with pytest.raises(JobFailed) as caught:
        await client._signed_again(failed)
    assert isinstance(caught.value.__cause__, JobConflict)


async def test_many_who_wait_lead_to_one_more_run(
    client: AsyncGenerationClient, redis: Redis, keys: Keys, ann: Ender
) -> None:
    await client.submit(job_id="job-1", prompt="a fox", lora_url=EXPIRED_LORA)
    await ann.expire_next()
    results = [begun(client.result("job-1", run=1, resign=True)) for _ in range(20)]
    await run_is_queued(client, 2)
    event = await ann.succeed_next(run=2)
    assert await asyncio.gather(*results) == [event] * 20
    started = [event["id"] for event in await completions(redis, keys) if event["type"] == "generation.succeeded"]
    assert started == ["job-1:2:succeeded"]


@pytest.mark.parametrize("limit", ["queue", "total"])
async def test_the_limits_go_on_over_the_second_run(client: AsyncGenerationClient, ann: Ender, limit: str) -> None:
    await client.submit(job_id="job-1", prompt="a fox", lora_url=EXPIRED_LORA)
    await ann.expire_next()
    limits: Any = {"queue_timeout_s" if limit == "queue" else "timeout_s": 0.2, "run_timeout_s": PATIENCE_S}
    with pytest.raises(WaitTimeout) as caught:
        await client.result("job-1", **limits, resign=True, cancel_on_timeout=True)
    assert caught.value.details == {"limit": limit}
    status = await client.status("job-1")
    assert (status.run, status.state) == (2, JobState.CANCELLED)
