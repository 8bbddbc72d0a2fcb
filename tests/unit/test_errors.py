import inspect
import re
from typing import Any

import pytest

from consumer import errors
from consumer.errors import PermanentError, RetryableError, WorkerError
from schemas.errors import ERROR_TABLE, ErrorCode, ErrorRule, Mover

# The contract's table. A row that speaks of several cases stands here with the one that a code means by itself.
CONTRACT = {
    "INVALID_REQUEST": ErrorRule(Mover.CALLER, retried=False, retry_after_s=None),
    "INVALID_PROMPT": ErrorRule(Mover.CALLER, retried=False, retry_after_s=None),
    "LORA_DOWNLOAD_FAILED": ErrorRule(Mover.CONSUMER, retried=True, retry_after_s=60),
    "LORA_LOAD_FAILED": ErrorRule(Mover.CALLER, retried=False, retry_after_s=None),
    "MODEL_LOAD_FAILED": ErrorRule(Mover.OPERATOR, retried=True, retry_after_s=60),
    "GENERATION_FAILED": ErrorRule(Mover.CONSUMER, retried=True, retry_after_s=30),
    "CUDA_OOM": ErrorRule(Mover.CONSUMER, retried=True, retry_after_s=30, max_attempts=3),
    "TIMEOUT": ErrorRule(Mover.BACKEND, retried=False, retry_after_s=0),
    "UPLOAD_FAILED": ErrorRule(Mover.CONSUMER, retried=True, retry_after_s=60),
    "EXPIRED": ErrorRule(Mover.BACKEND, retried=False, retry_after_s=0),
    "CANCELLED": ErrorRule(Mover.NOBODY, retried=False, retry_after_s=None),
    "WORKER_LOST": ErrorRule(Mover.OPERATOR, retried=False, retry_after_s=60),
    "INTERNAL": ErrorRule(Mover.OPERATOR, retried=True, retry_after_s=60),
}


def made(kind: type[WorkerError]) -> WorkerError:
    extra: dict[str, Any] = {"retry_after_s": 0} if "retry_after_s" in inspect.signature(kind).parameters else {}
    return kind("why", **extra)


def leaves() -> list[type[WorkerError]]:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, WorkerError)]
    return [kind for kind in classes if not kind.__subclasses__()]


@pytest.mark.parametrize("code", list(CONTRACT))
def test_a_code_means_what_the_contract_says(code: str) -> None:
    assert ERROR_TABLE[ErrorCode(code)] == CONTRACT[code]


def test_the_table_has_every_code_and_no_other() -> None:
    assert {str(code) for code in ErrorCode} == set(CONTRACT) == {str(code) for code in ERROR_TABLE}


def test_what_consumers_retry_can_succeed_later() -> None:
    assert all(rule.retry_after_s is not None for rule in ERROR_TABLE.values() if rule.retried)


@pytest.mark.parametrize("kind", leaves())
def test_every_error_of_the_consumer_has_a_code_and_one_of_the_two_families(kind: type[WorkerError]) -> None:
    assert kind.code in ERROR_TABLE
    assert issubclass(kind, RetryableError) != issubclass(kind, PermanentError)


@pytest.mark.parametrize("kind", leaves())
def test_a_retryable_error_has_a_code_that_consumers_retry(kind: type[WorkerError]) -> None:
    if issubclass(kind, RetryableError):
        assert ERROR_TABLE[kind.code].retried
        assert made(kind).retry_after_s == ERROR_TABLE[kind.code].retry_after_s


def test_every_code_but_the_requests_own_and_cancelled_has_an_error_in_the_tree() -> None:
    decided_elsewhere = {ErrorCode.INVALID_REQUEST, ErrorCode.INVALID_PROMPT, ErrorCode.CANCELLED}
    assert {kind.code for kind in leaves()} == set(ErrorCode) - decided_elsewhere


@pytest.mark.parametrize(
    ("error", "code", "retry_after_s"),
    [
        (errors.LoraUrlExpired("403"), "LORA_DOWNLOAD_FAILED", 0),
        (errors.LoraRefused("404"), "LORA_DOWNLOAD_FAILED", None),
        (errors.LoraFetchInterrupted("503"), "LORA_DOWNLOAD_FAILED", 60),
        (errors.LoraInvalid("pickle"), "LORA_LOAD_FAILED", None),
        (errors.ModelBroken("NaN"), "MODEL_LOAD_FAILED", 60),
        (errors.GenerationFailed("black"), "GENERATION_FAILED", 30),
        (errors.WeightsChanged("a bit"), "GENERATION_FAILED", 30),
        (errors.GpuOutOfMemory("full"), "CUDA_OOM", 30),
        (errors.AttemptTimeout("60 s"), "TIMEOUT", 0),
        (errors.UploadInterrupted("503"), "UPLOAD_FAILED", 60),
        (errors.UploadRefused("403", retry_after_s=0), "UPLOAD_FAILED", 0),
        (errors.RunExpired("late"), "EXPIRED", 0),
        (errors.WorkerLost("3 times"), "WORKER_LOST", 60),
        (errors.InternalError("ours"), "INTERNAL", 60),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_each_case_of_the_contract_tells_the_backend_when_to_come_back(
    error: WorkerError, code: str, retry_after_s: int | None
) -> None:
    assert (error.code, error.retry_after_s) == (code, retry_after_s)


@pytest.mark.parametrize("kind", leaves())
def test_the_tree_in_the_docstring_names_every_leaf(kind: type[WorkerError]) -> None:
    assert re.search(rf"\+-- {kind.__name__}\b", errors.__doc__ or "")
