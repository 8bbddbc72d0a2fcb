"""Waiting for jobs on a real Redis: progress, ends, limits, and a Redis that goes away meanwhile."""

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from structlog.testing import capture_logs

from demo.servers import redis_server
from producer import waiting
from producer.client import AsyncGenerationClient
from producer.errors import JobCancelled, JobFailed, JobUnknown, WaitTimeout
from producer.jobs import Progress
from schemas.errors import ErrorCode
from schemas.events import EventError
from schemas.keys import JobState, Keys
from schemas.requests import GenerationRequest
from tests import event_kit
from tests.integration.client_kit import PATIENCE_S, Ender, a_client, a_redis, begun, blocked, until
from tests.integration.queue_kit import publish


@pytest.fixture
async def client(client: AsyncGenerationClient) -> AsyncGenerationClient:
    """The client, which has submitted job-1."""
    await client.submit(job_id="job-1", prompt="a fox")
    return client


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at the job's hash five times a second instead of every five seconds."""
    monkeypatch.setattr(waiting, "BLOCK_S", 0.2)


async def test_an_end_that_comes_while_waiting_is_the_result(
    client: AsyncGenerationClient, redis: Redis, keys: Keys, ann: Ender
) -> None:
    result = begun(client.result("job-1"))
    await blocked(redis)
    event = await ann.succeed_next()
    assert await result == event


async def test_an_end_that_came_before_is_the_result_at_once(client: AsyncGenerationClient, ann: Ender) -> None:
    event = await ann.succeed_next()
    assert await client.result("job-1", timeout_s=0) == event


async def test_a_failed_job_raises_what_its_event_says(client: AsyncGenerationClient, ann: Ender) -> None:
    await ann.fail_next(error="a black picture")
    with pytest.raises(JobFailed, match="a black picture") as caught:
        await client.result("job-1")
    assert (caught.value.job_id, caught.value.error_code) == ("job-1", ErrorCode.GENERATION_FAILED)
    assert (caught.value.retry_after, caught.value.details) == (30, {})


async def test_a_cancelled_job_raises_while_it_is_waited_for(
    client: AsyncGenerationClient, redis: Redis, keys: Keys
) -> None:
    result = begun(client.result("job-1"))
    await blocked(redis)
    await client.cancel("job-1")
    with pytest.raises(JobCancelled) as caught:
        await result
    assert caught.value.error_code == ErrorCode.CANCELLED


async def test_the_job_goes_on_when_the_waiting_ends(client: AsyncGenerationClient, ann: Ender) -> None:
    with pytest.raises(WaitTimeout, match="job-1"):
        await client.result("job-1", timeout_s=0.05)
    assert (await client.status("job-1")).state == JobState.QUEUED
    event = await ann.succeed_next()
    assert await client.result("job-1") == event


async def test_the_job_is_cancelled_with_the_waiting_where_that_is_wanted(client: AsyncGenerationClient) -> None:
    with pytest.raises(WaitTimeout):
        await client.result("job-1", timeout_s=0.05, cancel_on_timeout=True)
    assert (await client.status("job-1")).state == JobState.CANCELLED


async def test_the_steps_come_in_order_and_the_end_comes_last(
    client: AsyncGenerationClient, redis: Redis, keys: Keys, ann: Ender
) -> None:
    lease, delivery = await ann.run_next()
    await ann.leases.progress(lease, 1, 28, 13.5)

    async def follow() -> list[object]:
        return [item async for item in client.events("job-1")]

    following = begun(follow())
    await blocked(redis)
    await ann.leases.progress(lease, 2, 28, 13.0)
    event = event_kit.succeeded("job-1")
    await ann.end(lease, delivery, event)
    await redis.xadd(keys.progress("job-1"), {"step": "3", "total": "28", "eta_s": "1"})
    assert await following == [Progress(1, 28, 13.5), Progress(2, 28, 13.0), event]


async def test_the_end_of_an_older_run_is_passed_over(
    client: AsyncGenerationClient, redis: Redis, keys: Keys, ann: Ender
) -> None:
    await ann.fail_next()
    result = begun(client.result("job-1", run=2))
    await blocked(redis)
    await publish(redis, keys, GenerationRequest(job_id="job-1", prompt="a fox"), run=2)
    event = await ann.succeed_next(run=2)
    assert await result == event


async def test_the_steps_of_an_older_run_are_not_shown_for_a_later_one(
    client: AsyncGenerationClient, redis: Redis, keys: Keys, ann: Ender
) -> None:
    lease, delivery = await ann.run_next()
    await ann.leases.progress(lease, 27, 28, 0.5)
    await ann.end(lease, delivery, event_kit.failed("job-1"))
    await ann.leases.progress(lease, 28, 28, 0.0)  # a consumer that is late

    shown: list[object] = []

    async def follow() -> None:
        async for item in client.events("job-1", run=2):
            shown.append(item)

    following = begun(follow())
    await blocked(redis)
    await client.resubmit("job-1")
    lease, delivery = await ann.run_next()

    async def step_is_shown() -> bool:
        await ann.leases.progress(lease, 1, 28, 13.5)
        return bool(shown)

    await until(step_is_shown)
    event = event_kit.succeeded("job-1", run=2)
    await ann.end(lease, delivery, event)
    await following
    assert shown == [Progress(1, 28, 13.5)] * (len(shown) - 1) + [event]


async def test_an_ended_run_shows_its_end_and_nothing_that_comes_after_it(
    client: AsyncGenerationClient, ann: Ender
) -> None:
    lease, delivery = await ann.run_next()
    await ann.leases.progress(lease, 1, 28, 13.5)
    event = event_kit.succeeded("job-1")
    await ann.end(lease, delivery, event)
    await ann.leases.progress(lease, 2, 28, 13.0)
    for _ in range(2):
        assert [item async for item in client.events("job-1")] == [event]


async def test_an_iteration_that_has_given_the_end_is_over(
    client: AsyncGenerationClient, redis: Redis, keys: Keys, ann: Ender
) -> None:
    items = client.events("job-1")
    first = begun(anext(items))
    await blocked(redis)
    event = await ann.fail_next()
    assert await first == event
    await client.resubmit("job-1")
    await redis.xadd(keys.progress("job-1"), {"step": "1", "total": "28", "eta_s": "1"})
    with pytest.raises(StopAsyncIteration):
        await begun(anext(items))


async def test_the_end_of_a_newer_run_ends_the_waiting_for_an_older_one(
    client: AsyncGenerationClient, ann: Ender
) -> None:
    await ann.fail_next()
    await client.resubmit("job-1")
    event = await ann.succeed_next(run=2)
    assert await client.result("job-1", run=1) == event


@pytest.mark.usefixtures("short_blocks")
async def test_an_end_whose_copy_was_lost_is_found_in_the_hash(
    client: AsyncGenerationClient, redis: Redis, keys: Keys
) -> None:
    result = begun(client.result("job-1"))
    await blocked(redis)
    event = event_kit.succeeded("job-1")
    await redis.hset(keys.job("job-1"), mapping={"state": "succeeded", "event": event.encode()})
    assert await result == event


@pytest.mark.usefixtures("short_blocks")
async def test_a_job_that_redis_forgets_meanwhile_is_unknown(
    client: AsyncGenerationClient, redis: Redis, keys: Keys
) -> None:
    result = begun(client.result("job-1"))
    await blocked(redis)
    await redis.delete(keys.job("job-1"))
    with pytest.raises(JobUnknown, match="any more"):
        await result


async def test_an_end_that_cannot_be_read_is_an_error_and_no_endless_wait(
    client: AsyncGenerationClient, redis: Redis, keys: Keys
) -> None:
    await redis.hset(keys.job("job-1"), mapping={"state": "succeeded", "event": b"{}"})
    with pytest.raises(EventError):
        await client.result("job-1")


async def test_an_abandoned_wait_leaves_no_connection(client: AsyncGenerationClient, redis: Redis, keys: Keys) -> None:
    before = len(await redis.client_list())
    result = begun(client.result("job-1"))
    await blocked(redis)
    result.cancel()
    with pytest.raises(asyncio.CancelledError):
        await result

    async def gone() -> bool:
        return len(await redis.client_list()) <= before

    await until(gone)  # the server sees the end of a connection a little later


@pytest.fixture
def lossy(client: AsyncGenerationClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loses the first cancellation during a read, as Python 3.11's wait_for does if a command is just sent."""
    read, lost = client.queue.progress, False

    async def lossy_read(*args: Any) -> Any:
        nonlocal lost
        try:
            return await read(*args)
        except asyncio.CancelledError:
            if lost:
                raise
            lost = True
            return []

    monkeypatch.setattr(client.queue, "progress", lossy_read)


@pytest.mark.usefixtures("lossy")
async def test_a_limit_holds_though_its_cancellation_is_lost_in_a_library(client: AsyncGenerationClient) -> None:
    with pytest.raises(WaitTimeout):
        await begun(client.result("job-1", timeout_s=0.05))


@pytest.mark.usefixtures("lossy")
async def test_an_abandoned_wait_ends_though_its_cancellation_is_lost_in_a_library(
    client: AsyncGenerationClient, redis: Redis
) -> None:
    result = asyncio.create_task(client.result("job-1"))
    await blocked(redis)
    result.cancel()
    done, _ = await asyncio.wait({result}, timeout=PATIENCE_S)
    assert done
    assert result.cancelled()


async def test_whoever_waits_while_being_cancelled_may_do_so(client: AsyncGenerationClient, ann: Ender) -> None:
    async def last_will() -> object:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(PATIENCE_S)
        return await client.result("job-1")

    waiting = asyncio.create_task(last_will())
    await asyncio.sleep(0)
    waiting.cancel()
    event = await ann.succeed_next()
    assert await waiting == event


async def test_many_waits_do_not_stand_in_each_others_way(
    client: AsyncGenerationClient, redis: Redis, keys: Keys, ann: Ender
) -> None:
    results = [begun(client.result("job-1")) for _ in range(120)]
    await blocked(redis, readers=120)
    event = await ann.succeed_next()
    assert await asyncio.gather(*results) == [event] * 120


async def test_an_outage_of_redis_is_waited_out(tmp_path: Path, keys: Keys) -> None:
    always = ("--appendonly", "yes", "--appendfsync", "always")
    with redis_server(tmp_path, *always) as first:
        async with a_client(first.url, keys) as client, a_redis(first.url) as redis:
            await client.submit(job_id="job-1", prompt="a fox")
            with capture_logs() as logs:
                result = begun(client.result("job-1"))
                await blocked(redis)
                first.process.kill()
                first.process.wait()
                await until(lambda: asyncio.sleep(0, bool(logs)))
                with redis_server(tmp_path, *always, port=first.port):
                    async with a_redis(first.url) as anew:
                        event = await Ender(anew, keys, "ann").succeed_next()
                    assert await result == event
    assert [entry["event"] for entry in logs] == ["redis_out_of_reach"]


async def test_the_limit_holds_during_an_outage_too(tmp_path: Path, keys: Keys) -> None:
    with redis_server(tmp_path) as server:
        async with a_client(server.url, keys) as client, a_redis(server.url) as redis:
            await client.submit(job_id="job-1", prompt="a fox")
            result = begun(client.result("job-1", timeout_s=1.0))
            await blocked(redis)
            server.process.kill()
            server.process.wait()
            with pytest.raises(WaitTimeout):
                await result


async def test_a_redis_that_is_away_from_the_start_is_waited_for_up_to_the_limit(tmp_path: Path, keys: Keys) -> None:
    with redis_server(tmp_path) as server:
        url = server.url
    async with a_client(url, keys) as client:
        with pytest.raises(WaitTimeout):
            await client.result("job-1", timeout_s=0.1)
        with pytest.raises(RedisConnectionError):
            await client.result("job-1")
