"""Everything that can go wrong with one job, as two families that decide what happens next.

    WorkerError
     +-- RetryableError            consumers try again after a delay, up to the run's attempts
     |    +-- LoraFetchInterrupted     429, 5xx, DNS, TLS, connect, reset, fetch deadline
     |    +-- ModelBroken              the base model failed under a running consumer
     |    +-- GenerationFailed         an error during inference, a black or NaN image
     |    +-- WeightsChanged           the model's weights were not those that the picture was asked of
     |    +-- GpuOutOfMemory
     |    +-- UploadInterrupted        the storage did not take the PNG
     |    +-- InternalError            a defect of ours
     +-- PermanentError            the same attempt would fail again
          +-- LoraRefused              forbidden URL, 4xx, 3xx, too large, wrong digest
          +-- LoraUrlExpired           401, 403: a freshly signed URL helps
          +-- LoraInvalid              not safetensors, not for SDXL, unknown or broken adapter
          +-- UploadRefused            401, 403 on, or expiry of, an upload URL; a key that another job's object holds
          +-- AttemptTimeout           the attempt's own work ran past `timeout`
          +-- RunExpired               `expires_at` passed before the first attempt
          +-- WorkerLost               consumers died on it as often as a run may be begun

Outside the tree, since they end an attempt without judging the job: `LeaseLost`, `JobCancelled`, `HandedBack`.
"""

from typing import ClassVar

from pydantic import JsonValue

from schemas.errors import ERROR_TABLE, ErrorCode


class WorkerError(Exception):
    """A failed attempt. `details` goes into the event (redacted there); `retry_after_s` as the contract has it."""

    code: ClassVar[ErrorCode]

    def __init__(self, message: str, *, details: dict[str, JsonValue] | None = None) -> None:
        super().__init__(message)
        self.details: dict[str, JsonValue] = details or {}
        self.retry_after_s = ERROR_TABLE[self.code].retry_after_s


class RetryableError(WorkerError):
    """Consumers try again by themselves. `delay_s`: the least delay that the other side asked for (Retry-After)."""

    def __init__(
        self, message: str, *, details: dict[str, JsonValue] | None = None, delay_s: float | None = None
    ) -> None:
        super().__init__(message, details=details)
        self.delay_s = delay_s


class PermanentError(WorkerError):
    """The run ends here."""


class LoraFetchInterrupted(RetryableError):
    code = ErrorCode.LORA_DOWNLOAD_FAILED


class ModelBroken(RetryableError):
    code = ErrorCode.MODEL_LOAD_FAILED


class GenerationFailed(RetryableError):
    code = ErrorCode.GENERATION_FAILED


class WeightsChanged(RetryableError):
    code = ErrorCode.GENERATION_FAILED


class GpuOutOfMemory(RetryableError):
    code = ErrorCode.CUDA_OOM


class UploadInterrupted(RetryableError):
    code = ErrorCode.UPLOAD_FAILED


class InternalError(RetryableError):
    code = ErrorCode.INTERNAL


class LoraRefused(PermanentError):
    code = ErrorCode.LORA_DOWNLOAD_FAILED

    def __init__(self, message: str, *, details: dict[str, JsonValue] | None = None) -> None:
        super().__init__(message, details=details)
        self.retry_after_s = None


class LoraUrlExpired(PermanentError):
    code = ErrorCode.LORA_DOWNLOAD_FAILED

    def __init__(self, message: str, *, details: dict[str, JsonValue] | None = None) -> None:
        super().__init__(message, details=details)
        self.retry_after_s = 0


class LoraInvalid(PermanentError):
    code = ErrorCode.LORA_LOAD_FAILED


class UploadRefused(PermanentError):
    """`retry_after_s`: 0 where a fresh URL helps, None where this key can never be written."""

    code = ErrorCode.UPLOAD_FAILED

    def __init__(self, message: str, *, retry_after_s: int | None, details: dict[str, JsonValue] | None = None) -> None:
        super().__init__(message, details=details)
        self.retry_after_s = retry_after_s


class AttemptTimeout(PermanentError):
    code = ErrorCode.TIMEOUT


class RunExpired(PermanentError):
    code = ErrorCode.EXPIRED


class WorkerLost(PermanentError):
    code = ErrorCode.WORKER_LOST


class LeaseLost(Exception):
    """Another consumer owns the job now: stop, publish nothing."""


class JobCancelled(Exception):
    """Somebody asked for cancellation. `stage`: how far the job had come."""

    def __init__(self, stage: str) -> None:
        super().__init__(stage)
        self.stage = stage


class HandedBack(Exception):
    """This consumer is shutting down: the job goes back, and the attempt does not count."""
