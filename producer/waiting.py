"""Waiting for a run without polling: its progress stream ends with a copy of its terminal event."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import TypeVar

import structlog
from redis import exceptions as redis_errors
from redis.asyncio import Redis

from producer.errors import JobUnknown
from producer.jobs import CancelOutcome, CancelVerdict, Progress
from producer.limits import Limits
from producer.queue import JobRecord, ProducerQueue, StreamEntry
from schemas.events import CancelledEvent, FailedEvent, SucceededEvent, TerminalEvent, decode_event
from schemas.keys import JobState

BLOCK_S = 5.0
_OUTAGE_PAUSE_S = 0.5
_LAST_LOOK_S = 1.0
_OUT_OF_REACH = (redis_errors.ConnectionError, redis_errors.TimeoutError)

T = TypeVar("T")

log = structlog.get_logger(__name__)


async def watch(
    queue: ProducerQueue, connect: Callable[[], Redis], record: JobRecord, run: int
) -> AsyncGenerator[Progress | TerminalEvent, None]:
    """Yields the progress of a job from its first step on, then the terminal event of `run` or of a newer run.

    The job's hash is looked at again whenever the stream has been silent for `BLOCK_S`, and until it knows of `run`:
    steps that came before are an older run's. While Redis is out of reach it goes on trying. Raises JobUnknown when
    Redis has forgotten the job, EventError.
    """
    after, was_reachable = "0-0", True
    event = terminal_of(record, run)
    reader = connect()  # a blocked connection serves nobody else
    try:
        while event is None:
            known_run = record.run
            entries, record = await _news(queue, reader, record, run, after)
            if entries is None:
                if was_reachable:
                    log.warning("redis_out_of_reach", job_id=record.job_id)
                was_reachable = False
                await asyncio.sleep(_OUTAGE_PAUSE_S)
                continue
            was_reachable = True
            steps, event = _decoded(entries, run)
            for step in steps if known_run >= run else ():
                yield step
            event = event or terminal_of(record, run)
            after = entries[-1].entry_id if entries else after
        yield event
    finally:
        await reader.aclose()


async def _news(
    queue: ProducerQueue, reader: Redis, record: JobRecord, run: int, after: str
) -> tuple[list[StreamEntry] | None, JobRecord]:
    """The progress entries after an entry id, None where Redis is out of reach, and the job's hash as last seen."""
    cancellations = _cancellations()
    entries: list[StreamEntry] | None
    try:
        entries = await queue.progress(reader, record.job_id, after, int(BLOCK_S * 1000))
        if not entries or record.run < run:
            record = await _look(queue, record.job_id)
    except redis_errors.AuthenticationError:
        raise
    except _OUT_OF_REACH:
        entries = None
    if _cancellations() > cancellations:
        # Python 3.11's wait_for loses a cancellation that comes while redis-py sends a command
        raise asyncio.CancelledError
    return entries, record


async def heeding_cancellation(call: Awaitable[T]) -> T:
    """What `call` returns; raises CancelledError where a cancellation was lost in it, as Python 3.11's wait_for may."""
    cancellations = _cancellations()
    answer = await call
    if _cancellations() > cancellations:
        raise asyncio.CancelledError
    return answer


def _cancellations() -> int:
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


async def first_look(limits: Limits, job_id: str, look: Callable[[str], Awaitable[JobRecord]]) -> JobRecord:
    """What `look` finds. Where there is a limit, an outage is waited out, and ends in WaitTimeout when it passes.

    One look has `_LAST_LOOK_S`, however short the limit is: the job may have ended already.
    """
    now_s = asyncio.get_running_loop().time
    ends_at_s, limit = limits.next
    if ends_at_s is None:
        return await look(job_id)
    deadline = asyncio.timeout_at(max(ends_at_s, now_s() + _LAST_LOOK_S))
    try:
        async with deadline:
            while True:
                try:
                    return await look(job_id)
                except redis_errors.AuthenticationError:
                    raise
                except _OUT_OF_REACH as error:
                    log.warning("redis_out_of_reach", job_id=job_id, error=type(error).__name__)
                await asyncio.sleep(_OUTAGE_PAUSE_S)
    except TimeoutError:
        if not deadline.expired():
            raise
    raise limits.passed(job_id, limit)


async def end_within(
    limits: Limits,
    queue: ProducerQueue,
    connect: Callable[[], Redis],
    cancel: Callable[[str], Awaitable[CancelOutcome]] | None,
    record: JobRecord,
    run: int,
) -> TerminalEvent:
    """The terminal event of `run` or of a newer one.

    When a limit passes, the job's hash is looked at once: it may know of an end, or of the GPU, a moment earlier. If
    there is nothing to wait for any more, `cancel` is called, and may yet find the end. Raises WaitTimeout, and as
    `watch` does.
    """
    now_s = asyncio.get_running_loop().time
    while True:
        if _has_gpu(record, run):
            limits.has_gpu(now_s())
        found = await _end_or_limit(limits, watch(queue, connect, record, run))
        if not isinstance(found, str):
            return found
        record = await heeding_cancellation(_last_look(queue, record))
        if found == "queue" and _has_gpu(record, run):
            continue
        event = terminal_of(record, run)
        if event is None and cancel is not None:
            event = await _end_found_by_cancelling(queue, cancel, record.job_id, run)
        if event is None:
            raise limits.passed(record.job_id, found)
        return event


async def _end_found_by_cancelling(
    queue: ProducerQueue, cancel: Callable[[str], Awaitable[CancelOutcome]], job_id: str, run: int
) -> TerminalEvent | None:
    # The caller's limit has passed: an outage must not make it wait on, so the job may stay uncancelled.
    try:
        async with asyncio.timeout(_LAST_LOOK_S):
            if (await cancel(job_id)).verdict == CancelVerdict.ENDED:
                return terminal_of(await _look(queue, job_id), run)
    except (*_OUT_OF_REACH, TimeoutError) as error:
        log.warning("not_cancelled", job_id=job_id, error=type(error).__name__)
    return None


async def _end_or_limit(limits: Limits, items: AsyncGenerator[Progress | TerminalEvent, None]) -> TerminalEvent | str:
    """The terminal event among `items`, or the name of the limit that passed before it came."""
    ends_at_s, limit = limits.next
    deadline = asyncio.timeout_at(ends_at_s)
    try:
        async with deadline, aclosing(items):
            async for item in items:
                if not isinstance(item, Progress):
                    return item
                limits.has_gpu(asyncio.get_running_loop().time())
                ends_at_s, limit = limits.next
                deadline.reschedule(ends_at_s)
    except TimeoutError:
        if not deadline.expired():
            raise
    return limit


def terminal_of(record: JobRecord, run: int) -> TerminalEvent | None:
    """The terminal event that the job's hash holds, if it is of `run` or of a newer run."""
    if not record.state.terminal or record.event is None:
        return None
    return _terminal(record.event, run)


def _has_gpu(record: JobRecord, run: int) -> bool:
    return record.run >= run and record.state == JobState.RUNNING


async def _look(queue: ProducerQueue, job_id: str) -> JobRecord:
    record = await queue.job(job_id)
    if record is None:
        raise JobUnknown(f"nothing is known of the job {job_id} any more", job_id=job_id)
    return record


async def _last_look(queue: ProducerQueue, seen: JobRecord) -> JobRecord:
    try:
        async with asyncio.timeout(_LAST_LOOK_S):
            return await _look(queue, seen.job_id)
    except (*_OUT_OF_REACH, TimeoutError):
        return seen  # a limit holds during an outage, too


def _decoded(entries: Iterable[StreamEntry], run: int) -> tuple[list[Progress], TerminalEvent | None]:
    """The steps up to the end of the run, and that end if it is there."""
    steps: list[Progress] = []
    for entry in entries:
        fields = entry.fields
        if b"step" in fields:
            steps.append(Progress(int(fields[b"step"]), int(fields[b"total"]), float(fields[b"eta_s"])))
        elif (event := _terminal(fields[b"payload"], run)) is not None:
            return steps, event
    return steps, None


def _terminal(payload: bytes, run: int) -> TerminalEvent | None:
    event = decode_event(payload)
    if isinstance(event, SucceededEvent | FailedEvent | CancelledEvent) and event.data.run >= run:
        return event
    return None
