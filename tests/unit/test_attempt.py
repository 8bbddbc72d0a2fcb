"""Time and stopping, with a clock that the tests turn."""

import asyncio

import pytest

from consumer.attempt import Attempt
from consumer.errors import AttemptTimeout, HandedBack, JobCancelled, LeaseLost
from consumer.queue import Begun, Delivery, Lease
from schemas.requests import GenerationRequest


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def attempt(clock: Clock) -> Attempt:
    request = GenerationRequest(job_id="job-1", prompt="a fox", timeout=10)
    lease = Lease(Delivery("stream", "1-0", {}), "job-1", "ann#1")
    return Attempt(lease, request, 1, Begun("ok", 1, submitted_at_ms=1_000, now_ms=3_500), clock)


def test_only_the_attempts_own_work_counts(attempt: Attempt, clock: Clock) -> None:
    with attempt.working():
        clock.now += 3
        assert attempt.worked_s == 3
    clock.now += 1000  # behind another job
    with attempt.working():
        clock.now += 4
    assert attempt.worked_s == 7
    assert attempt.since_begin_s == 1007
    attempt.check()


def test_work_beyond_the_timeout_raises_with_where_it_was(attempt: Attempt, clock: Clock) -> None:
    attempt.stage = "running"
    with attempt.working():
        clock.now += 10.1
        with pytest.raises(AttemptTimeout) as caught:
            attempt.check()
    assert caught.value.details == {"timeout": 10, "stage": "running"}
    assert caught.value.retry_after_s == 0


def test_the_wait_before_begin_is_read_from_the_servers_clock(attempt: Attempt) -> None:
    assert attempt.waited_before_begin_s == 2.5


def test_the_first_reason_to_stop_counts(attempt: Attempt) -> None:
    attempt.stop(LeaseLost())
    attempt.stop(HandedBack())
    with pytest.raises(LeaseLost):
        attempt.check()


async def test_guarded_work_gives_its_result(attempt: Attempt) -> None:
    async def work() -> int:
        return 7

    with attempt.working():
        assert await attempt.guard(work()) == 7


async def test_guarded_work_raises_its_own_error(attempt: Attempt) -> None:
    async def work() -> None:
        raise ValueError("mine")

    with attempt.working(), pytest.raises(ValueError, match="mine"):
        await attempt.guard(work())


async def test_stopping_cancels_guarded_work_and_lets_it_clean_up(attempt: Attempt) -> None:
    cleaned = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cleaned.append(True)

    asyncio.get_running_loop().call_later(0.01, attempt.stop, JobCancelled("preparing"))
    with attempt.working(), pytest.raises(JobCancelled):
        await attempt.guard(work())
    assert cleaned == [True]


async def test_guarded_work_is_cut_off_at_the_timeout(attempt: Attempt, clock: Clock) -> None:
    with attempt.working():
        clock.now += 9.98
        with pytest.raises(AttemptTimeout):
            await attempt.guard(asyncio.sleep(60))


async def test_waiting_that_is_no_work_is_not_cut_off(attempt: Attempt, clock: Clock) -> None:
    with attempt.working():
        clock.now += 9.99
    clock.now += 60
    await attempt.guard(asyncio.sleep(0.02))
