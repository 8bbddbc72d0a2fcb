"""Cancelling a job wherever it is."""

from collections.abc import Callable
from datetime import datetime

from pydantic import JsonValue

from producer.jobs import CancelOutcome, CancelVerdict
from producer.queue import JobRecord, ProducerQueue
from schemas.events import CancelledData, CancelledEvent, cancelled
from schemas.keys import JobState
from schemas.redact import redact_bytes
from schemas.requests import RequestError, decode_request


async def cancel(queue: ProducerQueue, job_id: str, now: Callable[[], datetime]) -> CancelOutcome:
    """Ends a job that waits, or asks for its end: `AsyncGenerationClient.cancel`."""
    while True:
        record = await queue.job(job_id)
        if record is not None and record.state.terminal:
            return CancelOutcome(job_id, CancelVerdict.ENDED, record.state)
        if record is not None and record.state in (JobState.QUEUED, JobState.DELAYED):
            if await queue.cancel_waiting(record, *cancellation(record, now())):
                return CancelOutcome(job_id, CancelVerdict.CANCELLED, record.state)
            continue
        state = await queue.ask_to_cancel(job_id)
        if state in (None, JobState.PREPARING, JobState.RUNNING):
            return CancelOutcome(job_id, CancelVerdict.ASKED, state)


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
