"""Waiting for a run without polling: its progress stream ends with a copy of its terminal event."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator

import structlog
from redis import exceptions as redis_errors
from redis.asyncio import Redis

from producer.errors import JobUnknown
from producer.jobs import Progress
from producer.queue import JobRecord, ProducerQueue, StreamEntry
from schemas.events import CancelledEvent, FailedEvent, SucceededEvent, TerminalEvent, decode_event

BLOCK_S = 5.0
_OUTAGE_PAUSE_S = 0.5

log = structlog.get_logger(__name__)


async def watch(
    queue: ProducerQueue, connect: Callable[[], Redis], record: JobRecord, run: int
) -> AsyncGenerator[Progress | TerminalEvent, None]:
    """Yields the progress of a job from its first step on, then the terminal event of `run` or of a newer run.

    The job's hash is looked at again whenever the stream has been silent for `BLOCK_S`. While Redis is out of reach
    it goes on trying. Raises JobUnknown when Redis has forgotten the job, EventError.
    """
    after, was_reachable = "0-0", True
    event = _terminal_of(record, run)
    reader = connect()  # a blocked connection serves nobody else
    try:
        while event is None:
            try:
                entries = await queue.progress(reader, record.job_id, after, int(BLOCK_S * 1000))
                if not entries:
                    event = _terminal_of(await _look(queue, record.job_id), run)
                was_reachable = True
            except redis_errors.AuthenticationError:
                raise
            except (redis_errors.ConnectionError, redis_errors.TimeoutError):
                if was_reachable:
                    log.warning("redis_out_of_reach", job_id=record.job_id)
                was_reachable = False
                await asyncio.sleep(_OUTAGE_PAUSE_S)
                continue
            for item in _decoded(entries, run):
                if not isinstance(item, Progress):
                    event = item
                    break
                yield item
            after = entries[-1].entry_id if entries else after
        yield event
    finally:
        await reader.aclose()


async def _look(queue: ProducerQueue, job_id: str) -> JobRecord:
    record = await queue.job(job_id)
    if record is None:
        raise JobUnknown(f"nothing is known of the job {job_id} any more", job_id=job_id)
    return record


def _terminal_of(record: JobRecord, run: int) -> TerminalEvent | None:
    if not record.state.terminal or record.event is None:
        return None
    return _terminal(record.event, run)


def _decoded(entries: Iterable[StreamEntry], run: int) -> Iterator[Progress | TerminalEvent]:
    for entry in entries:
        if b"step" in entry.fields:
            fields = entry.fields
            yield Progress(int(fields[b"step"]), int(fields[b"total"]), float(fields[b"eta_s"]))
        elif (event := _terminal(entry.fields[b"payload"], run)) is not None:
            yield event


def _terminal(payload: bytes, run: int) -> TerminalEvent | None:
    event = decode_event(payload)
    if isinstance(event, SucceededEvent | FailedEvent | CancelledEvent) and event.data.run >= run:
        return event
    return None
