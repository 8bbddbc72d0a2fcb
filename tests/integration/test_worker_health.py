"""When a consumer gives itself up: its jobs go back, others draw them, and its process ends with a failure."""

import asyncio

import pytest
from redis.asyncio import Redis

from consumer.errors import GenerationFailed, GpuOutOfMemory, LoraUrlExpired, ModelBroken
from demo.servers import RedisServer
from schemas.keys import Keys
from tests.integration.queue_kit import a_request, job, publish, where_is
from tests.integration.worker_kit import Bench, of_job

pytestmark = pytest.mark.usefixtures("short_reads")


@pytest.fixture
def bench(redis: Redis, keys: Keys, redis_at: RedisServer) -> Bench:
    return Bench(redis, keys, redis_at.url)


async def test_three_failures_in_a_row_of_differing_jobs_end_the_consumer_and_cost_nobody_else_an_attempt(
    bench: Bench,
) -> None:
    """Guards the count in `Health._note`."""
    bench.engine.fail_with = [GenerationFailed("black"), ZeroDivisionError(), GpuOutOfMemory("full")]
    for name in "abcde":
        await publish(bench.redis, bench.keys, a_request(name))
    async with bench.worker("ann", retry_base_s=60) as worker:
        await asyncio.wait_for(worker.run(), 10)
    assert isinstance(worker.broken, ModelBroken)
    assert "3 jobs in a row" in str(worker.broken)
    for name in "de":
        assert (await job(bench.redis, bench.keys, name)).get("attempt", "0") == "0"
    async with bench.working("bob"):
        events = await bench.ended("d", "e")
    assert [of_job(events, name)[-1] for name in "abcde"] == ["retrying"] * 3 + ["succeeded"] * 2


async def test_one_jobs_own_failures_are_no_reason_to_go(bench: Bench) -> None:
    """Guards that `Health` counts jobs, and not attempts."""
    bench.engine.fail_with = [GenerationFailed("black")] * 5
    await publish(bench.redis, bench.keys, a_request("a"))
    async with bench.working(max_attempts=5) as worker:
        await bench.ended("a")
        assert worker.broken is None


async def test_a_picture_between_failures_sets_the_count_back(bench: Bench) -> None:
    """Guards `Health.drew`."""
    async with bench.working(max_attempts=1) as worker:
        for name in "abcdef":
            bench.engine.fail_with = [] if name in "cf" else [GenerationFailed("black")]
            await publish(bench.redis, bench.keys, a_request(name))
            await bench.ended(name)
        assert worker.broken is None


async def test_what_storage_and_callers_do_wrong_is_no_reason_to_go(bench: Bench) -> None:
    """Guards `_is_suspect`."""
    bench.fetcher.fail_with = [LoraUrlExpired("403")] * 4
    async with bench.working() as worker:
        for name in "abcd":
            await publish(bench.redis, bench.keys, a_request(name, lora_key="x"))
        await bench.ended(*"abcd")
        assert worker.broken is None


async def test_a_gpu_that_hangs_is_noticed_and_its_job_drawn_elsewhere(bench: Bench) -> None:
    """Guards the wait in `Stages._draw`: without its limit the lease is renewed for ever."""
    bench.engine.step_s = 1.5
    for name in "ab":
        await publish(bench.redis, bench.keys, a_request(name))
    async with bench.worker("ann", stall_s=0.3) as worker:
        await asyncio.wait_for(worker.run(), 10)
    assert "no step further" in str(worker.broken)
    assert (await job(bench.redis, bench.keys, "b")).get("attempt", "0") == "0"
    bench.engine.step_s = 0.0
    async with bench.working("bob"):
        events = await bench.ended("a", "b")
    assert of_job(events, "a") == ["started", "retrying", "started", "succeeded"]


async def test_a_slow_picture_that_comes_on_is_left_in_peace(bench: Bench) -> None:
    """Guards that each step counts, in `ProgressWriter.note`."""
    bench.engine.step_s = 0.05
    await publish(bench.redis, bench.keys, a_request("a"))
    async with bench.working(stall_s=0.5):
        events = await bench.ended("a")
    assert of_job(events, "a") == ["started", "succeeded"]


async def test_a_consumer_that_cannot_keep_its_leases_hands_everything_back_and_fails(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards `Worker._stop_without_leases`, and that `run` tells of it."""

    async def defect(*_: object) -> None:
        raise ZeroDivisionError

    bench.engine.step_s = 0.2
    await publish(bench.redis, bench.keys, a_request("a"))
    async with bench.worker("ann", drain_s=0.1, lease_s=1.5) as worker:
        running = asyncio.create_task(worker.run())
        await bench.started("a")
        monkeypatch.setattr("consumer.keeper.Keeper._announce", defect)
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(running, 15)
    assert (await job(bench.redis, bench.keys, "a"))["attempt"] == "0"


async def test_a_cancelled_worker_takes_nothing_any_more(bench: Bench) -> None:
    """Guards `end` in `Stop.unless_asked`: a read that went on would take the next entry for nobody."""
    async with bench.worker("ann") as worker:
        running = asyncio.create_task(worker.run())
        await asyncio.sleep(0.3)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await publish(bench.redis, bench.keys, a_request("a"))
        await asyncio.sleep(1.0)
        assert await where_is(bench.redis, bench.keys, "a") == ["stream"]
