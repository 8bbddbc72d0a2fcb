"""Every error of the backend's side says what a backend has to know."""

import pytest

from producer import errors
from producer.errors import ClientErrorCode, JobCancelled, JobConflict, JobFailed, ProducerError, QueueFull
from producer.jobs import Job
from producer.submissions import Submitted
from producer.verdicts import error_of, job_or_error, picture_or_raise, taken
from schemas.errors import ErrorCode
from schemas.keys import JobState
from tests import event_kit

LEAVES = [kind for kind in vars(errors).values() if isinstance(kind, type) and kind.__base__ is ProducerError]


def test_the_drawn_tree_has_every_error_and_no_other() -> None:
    drawn = [line.split("+-- ")[1].split()[0] for line in (errors.__doc__ or "").splitlines() if "+-- " in line]
    assert drawn == [kind.__name__ for kind in LEAVES]


@pytest.mark.parametrize("kind", LEAVES)
def test_an_error_has_a_code_without_being_told_one(kind: type[ProducerError]) -> None:
    error = kind("why", job_id="j", retry_after=3)
    assert (error.job_id, error.retry_after, error.details) == ("j", 3, {})
    if kind is not JobFailed:  # it has its event's
        assert error.error_code in [*ErrorCode, *ClientErrorCode]


def test_a_failed_run_is_an_error_with_everything_its_event_says() -> None:
    event = event_kit.failed("j", error="a black picture")
    with pytest.raises(JobFailed, match="a black picture") as caught:
        picture_or_raise(event)
    assert (caught.value.job_id, caught.value.error_code) == ("j", ErrorCode.GENERATION_FAILED)
    assert (caught.value.retry_after, caught.value.details) == (30, {})


def test_a_cancelled_run_is_an_error_of_its_own_and_a_picture_is_none() -> None:
    error = error_of(event_kit.cancelled("j"))
    assert (type(error), error.job_id, error.error_code) == (JobCancelled, "j", ErrorCode.CANCELLED)
    picture = event_kit.succeeded("j")
    assert picture_or_raise(picture) is picture


@pytest.mark.parametrize(
    ("reply", "kind", "code", "retry_after"),
    [
        (Submitted("full", 7, "", retry_after=9), QueueFull, ClientErrorCode.QUEUE_FULL, 9),
        (Submitted("tenant_full", 7, "", retry_after=9), QueueFull, ClientErrorCode.QUEUE_FULL, 9),
        (Submitted("unheard", 7, "", retry_after=9), QueueFull, ClientErrorCode.QUEUE_FULL, 9),
        (Submitted("conflict", 1, "queued"), JobConflict, ClientErrorCode.JOB_CONFLICT, None),
        (Submitted("refused", 1, "queued"), JobConflict, ClientErrorCode.JOB_CONFLICT, None),
    ],
)
def test_what_the_queue_does_not_take_is_an_error_with_its_job_and_code(
    reply: Submitted, kind: type[ProducerError], code: ClientErrorCode, retry_after: int | None
) -> None:
    with pytest.raises(kind) as caught:
        taken(job_or_error("j", reply))
    assert (caught.value.job_id, caught.value.error_code, caught.value.retry_after) == ("j", code, retry_after)


@pytest.mark.parametrize(
    ("reply", "message", "details"),
    [
        (Submitted("full", 7, ""), "7 jobs are waiting already", {"limit": "queue"}),
        (Submitted("tenant_full", 7, ""), "7 jobs of its tenant are unfinished already", {"limit": "tenant"}),
        (
            Submitted("unheard", 7, "", group="audit"),
            "7 events are kept that the group audit has not acknowledged",
            {"limit": "completions", "group": "audit"},
        ),
        (Submitted("unheard", 7, ""), "7 events are kept that nobody listens for", {"limit": "completions"}),
    ],
    ids=["queue", "tenant", "completions", "completions without a group"],
)
def test_a_refusal_for_want_of_room_names_its_limit(reply: Submitted, message: str, details: dict[str, str]) -> None:
    error = job_or_error("j", reply)
    assert isinstance(error, QueueFull)
    assert (str(error), error.details) == (message, details)


def test_what_it_takes_is_the_job() -> None:
    assert taken(job_or_error("j", Submitted("same", 2, "running"))) == Job("j", 2, JobState.RUNNING, duplicate=True)
