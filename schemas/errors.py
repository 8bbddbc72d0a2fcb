"""Error codes and the one table that says what each of them means to the two sides."""

from dataclasses import dataclass
from enum import StrEnum


class ErrorCode(StrEnum):
    """`error_code` of a `failed`, `retrying` or `cancelled` event."""

    INVALID_REQUEST = "INVALID_REQUEST"
    INVALID_PROMPT = "INVALID_PROMPT"
    LORA_DOWNLOAD_FAILED = "LORA_DOWNLOAD_FAILED"
    LORA_LOAD_FAILED = "LORA_LOAD_FAILED"
    MODEL_LOAD_FAILED = "MODEL_LOAD_FAILED"
    GENERATION_FAILED = "GENERATION_FAILED"
    CUDA_OOM = "CUDA_OOM"
    TIMEOUT = "TIMEOUT"
    UPLOAD_FAILED = "UPLOAD_FAILED"
    EXPIRED = "EXPIRED"
    CANCELLED = "CANCELLED"
    WORKER_LOST = "WORKER_LOST"
    INTERNAL = "INTERNAL"


class Mover(StrEnum):
    """Who has to act before the same job can succeed."""

    CALLER = "caller"
    BACKEND = "backend"
    CONSUMER = "consumer"
    OPERATOR = "operator"
    NOBODY = "nobody"


@dataclass(frozen=True, slots=True)
class ErrorRule:
    """What a code means unless the error at hand says otherwise.

    `retried`: consumers try again by themselves. `retry_after_s`: what a terminal event tells the backend: 0 at once,
    None never. `max_attempts`: a bound below the general one.
    """

    mover: Mover
    retried: bool
    retry_after_s: int | None
    max_attempts: int | None = None


ERROR_TABLE: dict[ErrorCode, ErrorRule] = {
    ErrorCode.INVALID_REQUEST: ErrorRule(Mover.CALLER, False, None),
    ErrorCode.INVALID_PROMPT: ErrorRule(Mover.CALLER, False, None),
    ErrorCode.LORA_DOWNLOAD_FAILED: ErrorRule(Mover.CONSUMER, True, 60),
    ErrorCode.LORA_LOAD_FAILED: ErrorRule(Mover.CALLER, False, None),
    ErrorCode.MODEL_LOAD_FAILED: ErrorRule(Mover.OPERATOR, True, 60),
    ErrorCode.GENERATION_FAILED: ErrorRule(Mover.CONSUMER, True, 30),
    ErrorCode.CUDA_OOM: ErrorRule(Mover.CONSUMER, True, 30, max_attempts=3),
    ErrorCode.TIMEOUT: ErrorRule(Mover.BACKEND, False, 0),
    ErrorCode.UPLOAD_FAILED: ErrorRule(Mover.CONSUMER, True, 60),
    ErrorCode.EXPIRED: ErrorRule(Mover.BACKEND, False, 0),
    ErrorCode.CANCELLED: ErrorRule(Mover.NOBODY, False, None),
    ErrorCode.WORKER_LOST: ErrorRule(Mover.OPERATOR, False, 60),
    ErrorCode.INTERNAL: ErrorRule(Mover.OPERATOR, True, 60),
}
