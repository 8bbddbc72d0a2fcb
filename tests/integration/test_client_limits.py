"""The limits of a wait on a real Redis: which of them passes, and what is found when one has."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import TimeoutError as RedisTimeout

from producer.client import AsyncGenerationClient
from producer.errors import JobCancelled, JobFailed, WaitTimeout
from schemas.keys import JobState, Keys
from tests.integration.client_kit import PATIENCE_S, Ender, begun, blocked, until
from tests.integration.queue_kit import retrying

SOON_S = 0.05

Before = Callable[[int, Callable[[], Awaitable[Any]]], None]


@pytest.fixture
async def client(client: AsyncGenerationClient) -> AsyncGenerationClient:
    """The client, which has submitted job-1."""
    await client.submit(job_id="job-1", prompt="a fox")
    return client


@pytest.fixture
def before_look(client: AsyncGenerationClient, monkeypatch: pytest.MonkeyPatch) -> Before:
    """Lets something happen just before the n-th look at a job's hash."""

    def arrange(number: int, act: Callable[[], Awaitable[Any]]) -> None:
        look, looks = client.queue.job, 0

        async def late_look(job_id: str) -> Any:
            nonlocal looks
            looks += 1
            if looks == number:
                await act()
            return await look(job_id)

        monkeypatch.setattr(client.queue, "job", late_look)

    return arrange


async def limit_of(waiting: Awaitable[Any]) -> str:
    """The limit that passes."""
    with pytest.raises(WaitTimeout, match="job-1") as caught:
        await waiting
    return str(caught.value.details["limit"])


async def test_a_job_that_gets_no_gpu_passes_the_queues_limit(client: AsyncGenerationClient) -> None:
    waiting = client.result("job-1", queue_timeout_s=SOON_S, run_timeout_s=0, timeout_s=PATIENCE_S)
    assert await limit_of(waiting) == "queue"
    assert (await client.status("job-1")).state == JobState.QUEUED


async def test_a_job_that_is_only_prepared_has_no_gpu_yet(client: AsyncGenerationClient, ann: Ender) -> None:
    await ann.take_next()
    assert await limit_of(client.result("job-1", queue_timeout_s=SOON_S, run_timeout_s=0)) == "queue"


async def test_a_job_that_runs_from_the_start_has_passed_the_queue(client: AsyncGenerationClient, ann: Ender) -> None:
    await ann.run_next()
    assert await limit_of(client.result("job-1", queue_timeout_s=0, run_timeout_s=SOON_S)) == "run"


async def test_the_first_step_starts_the_runs_clock(
    client: AsyncGenerationClient, redis: Redis, keys: Keys, ann: Ender
) -> None:
    waiting = begun(limit_of(client.result("job-1", queue_timeout_s=PATIENCE_S, run_timeout_s=SOON_S)))
    await blocked(redis)
    lease, _ = await ann.run_next()
    await ann.leases.progress(lease, 1, 28, 13.5)
    assert await waiting == "run"


async def test_a_job_that_has_the_gpu_and_no_step_yet_is_found_running_when_the_queues_limit_passes(
    client: AsyncGenerationClient, ann: Ender, before_look: Before
) -> None:
    before_look(2, ann.run_next)
    assert await limit_of(client.result("job-1", queue_timeout_s=SOON_S, run_timeout_s=SOON_S)) == "run"


async def test_a_job_that_is_found_running_is_waited_for_to_its_end(
    client: AsyncGenerationClient, redis: Redis, ann: Ender, before_look: Before
) -> None:
    leases: list[Any] = []

    async def start() -> None:
        leases.append(await ann.run_next())

    before_look(2, start)
    result = begun(client.result("job-1", queue_timeout_s=SOON_S, run_timeout_s=PATIENCE_S))
    await until(lambda: asyncio.sleep(0, bool(leases)))
    event = await ann.succeed(*leases[0])
    assert await result == event


async def test_the_limit_for_everything_passes_in_the_queue_and_on_the_gpu(
    client: AsyncGenerationClient, ann: Ender
) -> None:
    limits: Any = {"queue_timeout_s": PATIENCE_S, "run_timeout_s": PATIENCE_S, "timeout_s": SOON_S}
    assert await limit_of(client.result("job-1", **limits)) == "total"
    await ann.run_next()
    assert await limit_of(client.result("job-1", **limits)) == "total"


async def test_the_delay_of_a_retry_counts_as_running_once_the_job_has_had_the_gpu(
    client: AsyncGenerationClient, ann: Ender
) -> None:
    lease, _ = await ann.run_next()
    await ann.leases.progress(lease, 1, 28, 13.5)
    await ann.leases.retry(lease, retrying(lease), 60)
    assert await limit_of(client.result("job-1", queue_timeout_s=PATIENCE_S, run_timeout_s=SOON_S)) == "run"


async def test_the_delay_of_a_retry_counts_as_waiting_before(client: AsyncGenerationClient, ann: Ender) -> None:
    lease, _ = await ann.take_next()
    await ann.leases.retry(lease, retrying(lease), 60)
    assert await limit_of(client.result("job-1", queue_timeout_s=SOON_S, run_timeout_s=0)) == "queue"


@pytest.mark.parametrize("limit", ["queue_timeout_s", "timeout_s"])
@pytest.mark.parametrize("cancels", [False, True])
async def test_an_end_just_before_a_limit_is_the_result(
    client: AsyncGenerationClient, ann: Ender, before_look: Before, limit: str, cancels: bool
) -> None:
    before_look(2, ann.succeed_next)
    options: Any = {limit: SOON_S, "cancel_on_timeout": cancels}
    event = await client.result("job-1", **options)
    assert event == (await client.status("job-1")).event


async def test_a_job_that_ends_between_limit_and_cancellation_is_the_result(
    client: AsyncGenerationClient, ann: Ender, before_look: Before
) -> None:
    before_look(3, ann.succeed_next)
    event = await client.result("job-1", timeout_s=SOON_S, cancel_on_timeout=True)
    assert event == (await client.status("job-1")).event


async def test_a_job_that_fails_between_limit_and_cancellation_raises_its_failure(
    client: AsyncGenerationClient, ann: Ender, before_look: Before
) -> None:
    before_look(3, ann.fail_next)
    with pytest.raises(JobFailed):
        await client.result("job-1", timeout_s=SOON_S, cancel_on_timeout=True)


async def test_a_job_that_somebody_else_cancels_meanwhile_is_cancelled_and_not_late(
    client: AsyncGenerationClient, before_look: Before, redis: Redis, keys: Keys
) -> None:
    result = begun(client.result("job-1", timeout_s=PATIENCE_S / 2, cancel_on_timeout=True))
    await blocked(redis)
    await client.cancel("job-1")
    with pytest.raises(JobCancelled):
        await result


@pytest.mark.parametrize("limit", ["queue_timeout_s", "timeout_s"])
async def test_a_job_that_still_waits_is_cancelled_at_its_limit(client: AsyncGenerationClient, limit: str) -> None:
    options: Any = {limit: SOON_S, "cancel_on_timeout": True}
    await limit_of(client.result("job-1", **options))
    assert (await client.status("job-1")).state == JobState.CANCELLED


async def test_a_job_that_runs_is_asked_to_stop_at_its_limit(client: AsyncGenerationClient, ann: Ender) -> None:
    lease, _ = await ann.run_next()
    waiting = client.result("job-1", run_timeout_s=SOON_S, cancel_on_timeout=True)
    assert await limit_of(waiting) == "run"
    assert await ann.leases.progress(lease, 1, 28, 1.0) == "cancel"


async def test_waiting_for_a_run_that_never_comes_ends_at_the_limit_though_the_job_has_ended(
    client: AsyncGenerationClient, ann: Ender
) -> None:
    await ann.fail_next()
    assert await limit_of(client.result("job-1", run=2, timeout_s=SOON_S, cancel_on_timeout=True)) == "total"


async def test_a_cancellation_that_an_outage_prevents_does_not_make_the_caller_wait(
    client: AsyncGenerationClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def out_of_reach(job_id: str) -> None:
        raise RedisTimeout

    await client.submit(job_id="job-1", prompt="a fox")
    monkeypatch.setattr(client, "cancel", out_of_reach)
    with pytest.raises(WaitTimeout):
        await begun(client.result("job-1", timeout_s=0.05, cancel_on_timeout=True))


async def test_a_wait_that_begins_in_an_outage_ends_at_its_limit(
    client: AsyncGenerationClient, before_look: Before
) -> None:
    """Guards the repetition in `first_look`."""

    async def out_of_reach() -> None:
        raise RedisTimeout

    before_look(1, out_of_reach)
    assert await limit_of(begun(client.result("job-1", timeout_s=SOON_S))) == "total"


async def test_an_outage_when_a_wait_begins_is_waited_out(
    client: AsyncGenerationClient, before_look: Before, ann: Ender
) -> None:
    async def out_of_reach() -> None:
        raise RedisTimeout

    await ann.succeed_next()
    before_look(1, out_of_reach)
    assert (await begun(client.result("job-1", timeout_s=PATIENCE_S))).data.job_id == "job-1"
