"""What the queue and the consumers answered, as what a caller gets."""

from producer.errors import JobCancelled, JobConflict, JobFailed, ProducerError, QueueFull
from producer.jobs import Job
from producer.queue import Submitted
from schemas.events import CancelledEvent, FailedEvent, SucceededEvent, TerminalEvent
from schemas.keys import JobState

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


def taken(outcome: Job | ProducerError) -> Job:
    """Raises the error if it is one."""
    if isinstance(outcome, ProducerError):
        raise outcome
    return outcome


def picture_or_raise(event: TerminalEvent) -> SucceededEvent:
    """Raises JobFailed, JobCancelled."""
    if isinstance(event, SucceededEvent):
        return event
    raise error_of(event)


def error_of(event: FailedEvent | CancelledEvent) -> JobFailed | JobCancelled:
    """What a run's end without a picture is to its caller."""
    job_id = event.data.job_id
    if isinstance(event, CancelledEvent):
        return JobCancelled(f"the job {job_id} was cancelled", job_id=job_id)
    return JobFailed(
        event.data.error,
        job_id=job_id,
        error_code=event.data.error_code,
        retry_after=event.data.retry_after,
        details=event.data.details,
    )
