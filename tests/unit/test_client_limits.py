"""The three clocks of a wait, without any time passing."""

import asyncio
from contextlib import suppress

import pytest

from producer.limits import Limits
from producer.waiting import heeding_cancellation
from schemas.errors import ErrorCode


def limits(queue: float | None = None, run: float | None = None, total: float | None = None) -> Limits:
    return Limits(100.0, queue_timeout_s=queue, run_timeout_s=run, timeout_s=total)


def test_without_limits_nothing_ever_passes() -> None:
    clocks = limits()
    assert clocks.next[0] is None
    clocks.has_gpu(105)
    assert clocks.next[0] is None


@pytest.mark.parametrize(
    ("queue", "run", "total", "before", "after"),
    [
        (10, 20, 60, (110, "queue"), (125, "run")),
        (10, 20, 7, (107, "total"), (107, "total")),
        (10, 20, 12, (110, "queue"), (112, "total")),
        (None, 20, None, (None, "total"), (125, "run")),
        (10, None, None, (110, "queue"), (None, "total")),
        (0, 0, None, (100, "queue"), (105, "run")),
    ],
)
def test_the_queues_clock_goes_until_the_job_has_the_gpu_and_the_runs_from_then_on(
    queue: float | None, run: float | None, total: float | None, before: object, after: object
) -> None:
    clocks = limits(queue, run, total)
    assert clocks.next == before
    clocks.has_gpu(105)
    assert clocks.next == after


def test_a_job_that_gets_the_gpu_again_starts_no_clock_anew() -> None:
    clocks = limits(queue=10, run=20)
    clocks.has_gpu(105)
    clocks.has_gpu(117)
    assert clocks.next == (125, "run")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("queue", "the job j has not got the GPU within 1 s"),
        ("run", "the job j has not ended within 2.5 s on the GPU"),
        ("total", "the job j has not ended within 30 s"),
    ],
)
def test_the_error_says_which_limit_it_was_in_words_and_for_programs(name: str, said: str) -> None:
    error = limits(1, 2.5, 30).passed("j", name)
    assert (str(error), error.details, error.job_id) == (said, {"limit": name}, "j")
    assert (error.error_code, error.retry_after) == (ErrorCode.TIMEOUT, 0)


async def test_a_cancellation_that_is_lost_in_a_call_is_raised_after_it() -> None:
    async def loses_it() -> str:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        return "an answer"

    task = asyncio.create_task(heeding_cancellation(loses_it()))
    with pytest.raises(asyncio.CancelledError):
        await task
