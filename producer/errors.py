"""What the backend's side raises.

ProducerError
 +-- RequestRefused     the request does not fit the contract
 +-- JobConflict        another request has this `job_id`, or its last run does not allow a new one
 +-- QueueFull          too many jobs wait; `retry_after` says when to come back
 +-- JobFailed          the awaited run ended in `failed`
 +-- JobCancelled       the awaited run was cancelled
 +-- JobUnknown         nothing is known of this `job_id`
 +-- WaitTimeout        the caller's own limit passed; the job goes on
"""

from typing import Any

from schemas.errors import ErrorCode


class ProducerError(Exception):
    """`retry_after` is in seconds; None: never with this request."""

    def __init__(
        self,
        message: str,
        *,
        job_id: str | None = None,
        error_code: ErrorCode | None = None,
        retry_after: int | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.job_id = job_id
        self.error_code = error_code
        self.retry_after = retry_after
        self.details = details or {}


class RequestRefused(ProducerError):
    pass


class JobConflict(ProducerError):
    pass


class QueueFull(ProducerError):
    pass


class JobFailed(ProducerError):
    pass


class JobCancelled(ProducerError):
    pass


class JobUnknown(ProducerError):
    pass


class WaitTimeout(ProducerError):
    pass
