"""The demo judges itself: its plan fits the contract, and each kind of deviation is named."""

import hashlib
from itertools import groupby
from typing import Any

import pytest

from demo.checks import check_distinct, check_end, check_secrets, check_stored
from demo.jobs import REFUSED, EndedJob, PlannedJob, plan
from producer.errors import RequestRefused
from producer.requests import make_request
from producer.storage import PresignedUrls
from producer.store import StoredImage, StoredJob
from producer.tables import image_row, job_row
from schemas.errors import ErrorCode
from schemas.events import AppliedLora, FailedEvent, ModelInfo, SucceededEvent, TerminalEvent
from schemas.keys import JobState
from tests import event_kit

PNG = b"\x89PNG, let us say"


@pytest.fixture(scope="module")
def jobs() -> tuple[PlannedJob, ...]:
    return plan(
        PresignedUrls(endpoint_url="http://127.0.0.1:9", bucket="b", access_key_id="id", secret_access_key="secret")
    )


def request_of(job: PlannedJob) -> dict[str, Any]:
    return {"job_id": job.job_id, **job.fields}


def drawn(png: bytes = PNG, **more: Any) -> SucceededEvent:
    fields = {"image_sha256": hashlib.sha256(png).hexdigest(), "image_bytes": len(png), "image_size": (512, 512)}
    return event_kit.succeeded(**{**fields, **more})


def refused(code: ErrorCode = ErrorCode.INVALID_REQUEST, retry_after: int | None = None) -> FailedEvent:
    event = event_kit.failed()
    return event.model_copy(
        update={"data": event.data.model_copy(update={"error_code": code, "retry_after": retry_after})}
    )


def ended(
    event: TerminalEvent | None, *, png: bytes | None = PNG, code: ErrorCode | None = None, **fields: Any
) -> EndedJob:
    return EndedJob(PlannedJob("job-1", "g", "t", {"width": 512, "height": 512, **fields}, code), event, png)


def problems(*arguments: Any, **more: Any) -> list[str]:
    return list(check_end(ended(*arguments, **more)))


def test_the_plan_is_a_dozen_jobs_of_which_two_fail(jobs: tuple[PlannedJob, ...]) -> None:
    assert len({job.job_id for job in jobs}) == len(jobs) == 12
    assert [job.group for job in jobs if job.error_code is not None] == [REFUSED, REFUSED]


def test_each_group_of_the_plan_is_in_one_piece(jobs: tuple[PlannedJob, ...]) -> None:
    names = [name for name, _ in groupby(jobs, lambda job: job.group)]
    assert len(names) == len(set(names))


def test_the_client_takes_what_is_not_added_by_hand(jobs: tuple[PlannedJob, ...]) -> None:
    for job in jobs:
        if not job.by_hand:
            assert make_request(request_of(job)).job_id == job.job_id


def test_the_client_would_refuse_what_is_added_by_hand(jobs: tuple[PlannedJob, ...]) -> None:
    (job,) = (job for job in jobs if job.by_hand)
    with pytest.raises(RequestRefused) as refusal:
        make_request(request_of(job))
    assert refusal.value.error_code == job.error_code


def test_a_job_does_not_show_what_signs_its_urls(jobs: tuple[PlannedJob, ...]) -> None:
    assert any("X-Amz-Signature" in str(job.fields) for job in jobs)
    assert "X-Amz-Signature" not in repr(jobs)


def test_a_picture_as_planned_is_no_problem() -> None:
    assert problems(drawn()) == []


def test_a_refusal_as_planned_is_no_problem() -> None:
    assert problems(refused(), png=None, code=ErrorCode.INVALID_REQUEST) == []


@pytest.mark.parametrize("png", [None, b"", PNG + b"!"])
def test_a_stored_picture_that_is_not_the_events_is_named(png: bytes | None) -> None:
    assert problems(drawn(), png=png) == ["job-1: the stored picture is not the one that the event names"]


def test_a_picture_with_another_number_of_bytes_is_named() -> None:
    assert problems(drawn(image_bytes=1)) == ["job-1: the stored picture is not the one that the event names"]


def test_a_picture_of_another_size_is_named() -> None:
    assert problems(drawn(image_size=(768, 512))) == ["job-1: the picture has the size (768, 512)"]


@pytest.mark.parametrize(
    "loras",
    [(), (AppliedLora(name="one", scale=1.0, modules=1),), (AppliedLora(name="one", scale=1.0, modules=0),) * 2],
)
def test_a_lora_that_was_not_applied_is_named(loras: tuple[AppliedLora, ...]) -> None:
    event = drawn(model_info=ModelInfo(base_model="b", lora_applied=True, loras=loras))
    assert problems(event, loras=[{"key": "one"}, {"key": "two"}]) == ["job-1: not every LoRA was applied"]


def test_an_end_that_was_not_planned_is_named() -> None:
    assert problems(None) == ["job-1: no terminal event arrived"]
    assert problems(refused()) == ["job-1: ended with generation.failed"]
    assert problems(event_kit.cancelled()) == ["job-1: ended with generation.cancelled"]
    assert problems(drawn(), code=ErrorCode.TIMEOUT) == ["job-1: ended with generation.succeeded"]


def test_another_failure_than_the_planned_one_is_named() -> None:
    assert problems(refused(), code=ErrorCode.TIMEOUT) == ["job-1: failed with INVALID_REQUEST, retry after None"]
    event = refused(retry_after=60)
    assert problems(event, code=ErrorCode.INVALID_REQUEST) == ["job-1: failed with INVALID_REQUEST, retry after 60"]


def test_rows_that_say_what_the_event_says_are_no_problem() -> None:
    event = drawn()
    assert list(check_stored(ended(event), stored_job(event), StoredImage(**image_row(event)))) == []
    assert list(check_stored(ended(refused()), stored_job(refused()), None)) == []


def test_missing_and_different_rows_are_named() -> None:
    event, other = drawn(), drawn(b"another")
    wrong_state = stored_job(event_kit.cancelled())
    assert len(list(check_stored(ended(event), None, None))) == 2
    assert list(check_stored(ended(event), stored_job(event), StoredImage(**image_row(other)))) == [
        "job-1: the database has another picture than the event"
    ]
    assert list(check_stored(ended(refused()), wrong_state, None)) == [
        "job-1: the database says cancelled, the event generation.failed"
    ]


def test_two_equal_pictures_are_named() -> None:
    assert list(check_distinct([ended(drawn()), ended(drawn(b"another")), ended(refused())])) == []
    assert list(check_distinct([ended(drawn()), ended(drawn())])) == ["two jobs have the same picture"]


@pytest.mark.parametrize(
    "text",
    [b"/b/k?X-Amz-Signature=0", b"&x-amz-credential=0", b"?AWSAccessKeyId=0&Signature=0", b'"key": "Very-Secret"'],
)
def test_a_signature_or_credential_is_named_by_where_it_is(text: bytes) -> None:
    found = list(check_secrets([("a.log", b"GET /b/k"), ("b.log", b"... " + text)], ["very-secret"]))
    assert found == ["b.log contains a signature or a credential"]


def stored_job(event: TerminalEvent) -> StoredJob:
    row = job_row(event)
    return StoredJob(**{**row, "state": JobState(row["state"])})
