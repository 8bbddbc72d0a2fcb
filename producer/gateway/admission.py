"""From a call to a run: one for each idempotency key and body, and the next one where the last may be tried again."""

from producer.async_client import AsyncGenerationClient
from producer.errors import JobConflict
from producer.jobs import Job, JobStatus
from producer.queue import JobRecord
from producer.requests import RequestChanges
from schemas.events import FailedEvent
from schemas.keys import JobState, Priority
from schemas.requests import GenerationRequest, RequestError, decode_request

_TRIES = 10


async def admit(client: AsyncGenerationClient, request: GenerationRequest, priority: Priority) -> Job:
    """The run that answers `request`.

    That is the job's first run, or the one that is there (a duplicate) if its body is the same, `expires_at` and the
    queries of URLs aside. One that was cancelled, or failed and could succeed, is followed by the next run. Raises
    RequestRefused, JobConflict, QueueFull.
    """
    for _ in range(_TRIES):  # of two calls at the same moment the slower one finds what the faster one made
        try:
            job = await client.submit(request, priority=priority)
            if not job.state.terminal:
                return job
        except JobConflict:
            pass
        record = await client.queue.job(request.job_id)
        if record is None:
            continue
        if not _is_of(record, request):
            raise _conflict(request)
        if not _may_run_again(record):
            return Job(record.job_id, record.run, record.state, duplicate=True)
        try:
            run, urls = record.run + 1, _urls(request)
            return await client.resubmit(request.job_id, request=request, run=run, priority=priority, **urls)
        except JobConflict:
            continue
    raise _conflict(request)


def _is_of(record: JobRecord, request: GenerationRequest) -> bool:
    try:
        last = decode_request(record.payload)
    except RequestError:
        return False
    return _body(last) == _body(request)


def _body(request: GenerationRequest) -> str:
    return request.model_copy(update={"expires_at": None}).fingerprint()


def _may_run_again(record: JobRecord) -> bool:
    event = JobStatus.of(record).event
    if record.state is JobState.FAILED:
        return isinstance(event, FailedEvent) and event.data.retry_after is not None
    return record.state is JobState.CANCELLED


def _urls(request: GenerationRequest) -> RequestChanges:
    """What is said anew is not signed again by the client: these URLs are fresh, or need no signature."""
    urls: RequestChanges = {}
    if request.lora_url is not None:
        urls["lora_url"] = request.lora_url
    if request.loras:
        urls["loras"] = request.loras
    if request.upload_url is not None:
        urls["upload_url"] = request.upload_url
    return urls


def _conflict(request: GenerationRequest) -> JobConflict:
    job_id = request.job_id
    return JobConflict(f"another request has the job id {job_id}", job_id=job_id)
