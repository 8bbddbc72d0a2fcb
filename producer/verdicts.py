"""What the queue and the consumers answered, as what a caller gets."""

from producer.errors import JobCancelled, JobConflict, JobFailed, ProducerError, QueueFull
from producer.jobs import Job
from producer.submissions import Submitted
from schemas.events import CancelledEvent, FailedEvent, SucceededEvent, TerminalEvent
from schemas.keys import JobState


def job_or_error(job_id: str, reply: Submitted) -> Job | ProducerError:
    """The job that a submission led to, or JobConflict or QueueFull."""
    match reply.verdict:
        case "accepted" | "same":
            return Job(job_id, reply.run, JobState(reply.state), duplicate=reply.verdict == "same")
        case "full":
            return _queue_full(job_id, reply, "queue", f"{reply.run} jobs are waiting already")
        case "tenant_full":
            return _queue_full(job_id, reply, "tenant", f"{reply.run} jobs of its tenant are unfinished already")
        case "unheard":
            of_whom = f"the group {reply.group} has not acknowledged" if reply.group else "nobody listens for"
            return _queue_full(job_id, reply, "completions", f"{reply.run} events are kept that {of_whom}")
        case "conflict":
            return JobConflict(f"another request has the job id {job_id}", job_id=job_id)
        case _:
            return JobConflict(
                f"the job {job_id} is {reply.state} in run {reply.run}: this run cannot follow", job_id=job_id
            )


def _queue_full(job_id: str, reply: Submitted, limit: str, message: str) -> QueueFull:
    details = {"limit": limit} | ({"group": reply.group} if reply.group else {})
    return QueueFull(message, job_id=job_id, retry_after=reply.retry_after, details=details)


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
