"""What the queue and the consumers answered, as what a caller gets."""

from datetime import datetime

from pydantic import JsonValue

from producer.errors import JobCancelled, JobConflict, JobFailed, ProducerError, QueueFull
from producer.jobs import Job
from producer.queue import JobRecord, Submitted
from schemas.events import (
    CancelledData,
    CancelledEvent,
    FailedEvent,
    SucceededEvent,
    TerminalEvent,
    cancelled,
)
from schemas.keys import JobState
from schemas.redact import redact_bytes
from schemas.requests import RequestError, decode_request

QUEUE_FULL_RETRY_AFTER_S = 30  # a constant until the rate at which the queue drains is measured


def job_or_error(job_id: str, reply: Submitted) -> Job | ProducerError:
    """The job that a submission led to, or JobConflict or QueueFull."""
    match reply.verdict:
        case "accepted" | "same":
            return Job(job_id, reply.run, JobState(reply.state), duplicate=reply.verdict == "same")
        case "full":
            return QueueFull(
                f"{reply.run} jobs are waiting already", job_id=job_id, retry_after=QUEUE_FULL_RETRY_AFTER_S
            )
        case "conflict":
            return JobConflict(f"another request has the job id {job_id}", job_id=job_id)
        case _:
            return JobConflict(
                f"the job {job_id} is {reply.state} in run {reply.run}: this run cannot follow", job_id=job_id
            )


def picture_or_raise(event: TerminalEvent) -> SucceededEvent:
    """Raises JobFailed, JobCancelled."""
    data = event.data
    match event:
        case SucceededEvent():
            return event
        case FailedEvent():
            raise JobFailed(
                event.data.error,
                job_id=data.job_id,
                error_code=event.data.error_code,
                retry_after=event.data.retry_after,
                details=event.data.details,
            )
        case CancelledEvent():
            raise JobCancelled(
                f"the job {data.job_id} was cancelled", job_id=data.job_id, error_code=event.data.error_code
            )


def cancellation(record: JobRecord, at: datetime) -> tuple[CancelledEvent, bytes]:
    """The event that ends a waiting run, and the payload to keep, without signatures."""
    metadata: dict[str, JsonValue] = {}
    try:
        request = decode_request(record.payload)
        metadata, kept = request.metadata, request.redacted().encode()
    except RequestError:
        kept = redact_bytes(record.payload)
    data = CancelledData(
        job_id=record.job_id,
        run=record.run,
        attempt=record.attempt,
        consumer=None,
        request_metadata=metadata,
        stage="delayed" if record.state == JobState.DELAYED else "queued",
    )
    return cancelled(data, at), kept
