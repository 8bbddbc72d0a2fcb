"""What the backend's side raises, with its `error_code`.

ProducerError
 +-- RequestRefused     the request does not fit the contract: INVALID_REQUEST or INVALID_PROMPT
 +-- JobConflict        another request has this `job_id`, or its last run does not allow a new one: JOB_CONFLICT
 +-- QueueFull          a limit is reached, `details["limit"]`: queue, tenant or completions: QUEUE_FULL
 +-- JobFailed          the awaited run ended in `failed`: its event's code
 +-- JobCancelled       the awaited run was cancelled: CANCELLED
 +-- JobUnknown         nothing is known of this `job_id`: JOB_UNKNOWN
 +-- WaitTimeout        the caller's own limit passed: TIMEOUT
"""

from enum import StrEnum
from typing import Any

from schemas.errors import ErrorCode


class ClientErrorCode(StrEnum):
    """`error_code` of what no event says: the client itself has found it."""

    JOB_CONFLICT = "JOB_CONFLICT"
    QUEUE_FULL = "QUEUE_FULL"
    JOB_UNKNOWN = "JOB_UNKNOWN"


class ProducerError(Exception):
    """`retry_after` is in seconds; None: never with this request."""

    default_code: ErrorCode | ClientErrorCode | None = None

    def __init__(
        self,
        message: str,
        *,
        job_id: str | None = None,
        error_code: ErrorCode | ClientErrorCode | None = None,
        retry_after: int | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.job_id = job_id
        self.error_code = error_code or self.default_code
        self.retry_after = retry_after
        self.details = details or {}


class RequestRefused(ProducerError):
    default_code = ErrorCode.INVALID_REQUEST


class JobConflict(ProducerError):
    default_code = ClientErrorCode.JOB_CONFLICT


class QueueFull(ProducerError):
    """As many jobs wait, runs of the tenant are unfinished, or events are kept for a `details["group"]`, as may be."""

    default_code = ClientErrorCode.QUEUE_FULL


class JobFailed(ProducerError):
    pass


class JobCancelled(ProducerError):
    default_code = ErrorCode.CANCELLED


class JobUnknown(ProducerError):
    default_code = ClientErrorCode.JOB_UNKNOWN


class WaitTimeout(ProducerError):
    default_code = ErrorCode.TIMEOUT
