"""Which errors are tried again, and when."""

import pytest

from consumer import errors
from consumer.errors import (
    GpuOutOfMemory,
    LoraFetchInterrupted,
    LoraInvalid,
    RetryableError,
    UploadInterrupted,
    WorkerError,
)
from consumer.outcomes import RetryPolicy


def policy(max_attempts: int = 5, jitter: float = 1.0) -> RetryPolicy:
    return RetryPolicy(max_attempts, base_s=5, cap_s=60, uniform=lambda low, high: low + (high - low) * jitter)


def test_delays_double_up_to_the_cap() -> None:
    error = UploadInterrupted("x")
    assert [policy().delay_s(error, attempt) for attempt in (1, 2, 3, 4, 5, 50)] == [5, 10, 20, 40, 60, 60]


def test_jitter_goes_down_to_nothing() -> None:
    assert policy(jitter=0.0).delay_s(UploadInterrupted("x"), 3) == 0


@pytest.mark.parametrize(("asked_s", "delay_s"), [(0, 5), (3, 5), (45, 45), (3600, 60)])
def test_a_delay_that_was_asked_for_is_honoured_up_to_the_cap(asked_s: float, delay_s: float) -> None:
    assert policy().delay_s(LoraFetchInterrupted("x", delay_s=asked_s), 1) == delay_s


def test_passing_errors_are_tried_again_until_the_attempts_are_used_up() -> None:
    error = UploadInterrupted("x")
    assert [policy(3).may_retry(error, attempt) for attempt in (1, 2, 3, 4)] == [True, True, False, False]


def test_permanent_errors_are_not() -> None:
    assert not policy().may_retry(LoraInvalid("x"), 1)


def test_an_out_of_memory_is_tried_again_twice_whatever_the_setting() -> None:
    error = GpuOutOfMemory("x")
    assert [policy(9).may_retry(error, attempt) for attempt in (1, 2, 3)] == [True, True, False]
    assert [policy(2).may_retry(error, attempt) for attempt in (1, 2)] == [True, False]


def leaves(kind: type[WorkerError]) -> list[type[WorkerError]]:
    children = kind.__subclasses__()
    return [leaf for child in children for leaf in leaves(child)] if children else [kind]


def test_every_leaf_of_the_error_tree_has_a_code_and_a_family() -> None:
    found = leaves(WorkerError)
    assert len(found) == 14
    for leaf in found:
        assert leaf.code
        assert leaf.__name__ in (errors.__doc__ or "")
    assert {leaf.code for leaf in found if issubclass(leaf, RetryableError)} == {
        "LORA_DOWNLOAD_FAILED",
        "MODEL_LOAD_FAILED",
        "GENERATION_FAILED",
        "CUDA_OOM",
        "UPLOAD_FAILED",
        "INTERNAL",
    }
