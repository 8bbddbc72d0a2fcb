"""Every error code has one HTTP status."""

import pytest

from producer.errors import ClientErrorCode, JobFailed, ProducerError
from producer.gateway.errors import STATUS, GatewayErrorCode, answer, status_of
from schemas.errors import ErrorCode


def test_every_code_is_in_the_table() -> None:
    assert set(STATUS) == {*ErrorCode, *ClientErrorCode, *GatewayErrorCode}


@pytest.mark.parametrize(("retry_after", "status"), [(None, 400), (0, 400), (60, 502)])
def test_a_lora_that_cannot_be_had_is_the_callers_fault_unless_waiting_helps(
    retry_after: int | None, status: int
) -> None:
    assert status_of(ErrorCode.LORA_DOWNLOAD_FAILED, retry_after) == status


@pytest.mark.parametrize(
    ("code", "retry_after", "told"),
    [
        (ErrorCode.WORKER_LOST, 60, "60"),
        (ClientErrorCode.QUEUE_FULL, 30, "30"),
        (ErrorCode.TIMEOUT, 0, "0"),
        (ErrorCode.GENERATION_FAILED, None, None),
        (ErrorCode.LORA_DOWNLOAD_FAILED, 0, None),  # the same call with the same URL fails again
    ],
)
def test_a_caller_is_told_to_come_back_only_where_the_same_call_can_succeed(
    code: ErrorCode, retry_after: int | None, told: str | None
) -> None:
    error = JobFailed("no", error_code=code, retry_after=retry_after)
    assert answer(error).headers.get("Retry-After") == told


def test_an_error_without_a_code_is_a_defect_of_ours() -> None:
    assert answer(ProducerError("?")).status_code == 500
    assert answer(ValueError("s3cr3t")).status_code == 500
    assert b"s3cr3t" not in bytes(answer(ValueError("s3cr3t")).body)
