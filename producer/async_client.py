"""The backend's client: submit jobs, look at them, wait for them, cancel them."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from datetime import UTC, datetime
from functools import partial
from typing import Any, Self, Unpack

import structlog
from redis.asyncio import Redis

from producer.errors import JobUnknown, ProducerError, RequestRefused, WaitTimeout
from producer.jobs import CancelOutcome, CancelVerdict, Job, JobStatus, Progress
from producer.queue import JobRecord, ProducerQueue, connect, connect_for_blocking_reads
from producer.requests import RequestChanges, RequestFields, follow_up, make_request
from producer.settings import ProducerSettings
from producer.storage import PresignedUrls
from producer.verdicts import cancellation, job_or_error, picture_or_raise
from producer.waiting import BLOCK_S, watch
from schemas.events import SucceededEvent, TerminalEvent
from schemas.fields import is_job_id
from schemas.keys import JobState, Keys, Priority
from schemas.requests import GenerationRequest

_BATCH = 100

log = structlog.get_logger(__name__)


def _now() -> datetime:
    return datetime.now(UTC)


class AsyncGenerationClient:
    """One queue, as a backend sees it. Use it as an async context manager, in one event loop.

    `wake` is called after a submission that leaves a job queued; whatever it raises is logged only. `storage` signs
    own-bucket URLs again on `resubmit`. Every method may raise redis.RedisError: doing it again is safe, with the
    same `job_id` where there is one.
    """

    def __init__(
        self,
        redis_url: str,
        *,
        prefix: str,
        max_queue: int,
        job_ttl_s: float,
        storage: PresignedUrls | None = None,
        wake: Callable[[], Awaitable[None]] | None = None,
        now: Callable[[], datetime] = _now,
    ) -> None:
        self.storage = storage
        self._wake = wake
        self._now = now
        self._redis: Redis = connect(redis_url)
        self._connect_reader = partial(connect_for_blocking_reads, redis_url, block_s=BLOCK_S)
        self.queue = ProducerQueue(self._redis, Keys(prefix), max_queue=max_queue, job_ttl_s=job_ttl_s)

    @classmethod
    def from_settings(cls, settings: ProducerSettings, *, wake: Callable[[], Awaitable[None]] | None = None) -> Self:
        return cls(
            settings.redis_url.get_secret_value(),
            prefix=settings.prefix,
            max_queue=settings.max_queue,
            job_ttl_s=settings.job_ttl_s,
            storage=PresignedUrls.from_settings(settings),
            wake=wake,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._redis.aclose()

    async def submit(
        self,
        request: GenerationRequest | None = None,
        *,
        priority: Priority = Priority.NORMAL,
        **fields: Unpack[RequestFields],
    ) -> Job:
        """Submits a request, or the one that `fields` describe: once per `job_id`, however often it is called.

        Raises RequestRefused, JobConflict (the id has another body), QueueFull.
        """
        if request is not None and fields:
            raise TypeError("submit takes a request or its fields, not both")
        (job,) = await self.submit_many([fields if request is None else request], priority=priority)
        if isinstance(job, ProducerError):
            raise job
        return job

    async def submit_many(
        self,
        requests: Iterable[GenerationRequest | RequestFields | Mapping[str, Any]],
        *,
        priority: Priority = Priority.NORMAL,
    ) -> list[Job | ProducerError]:
        """Submits in batches of one round trip each. A request that is not taken becomes the error in its place.

        Where Redis fails in between, some are queued: submitting all of them again is safe if they have ids of
        their own.
        """
        checked = [_checked(request) for request in requests]
        good = [request for request in checked if isinstance(request, GenerationRequest)]
        outcomes: list[Job | ProducerError] = []
        for start in range(0, len(good), _BATCH):
            batch = good[start : start + _BATCH]
            replies = await self.queue.submit(batch, priority=priority)
            outcomes += [job_or_error(request.job_id, reply) for request, reply in zip(batch, replies, strict=True)]
        await self._wake_for(outcomes)
        remaining = iter(outcomes)
        return [next(remaining) if isinstance(request, GenerationRequest) else request for request in checked]

    async def resubmit(
        self,
        job_id: str,
        *,
        request: GenerationRequest | None = None,
        run: int | None = None,
        priority: Priority | None = None,
        **changes: Unpack[RequestChanges],
    ) -> Job:
        """Submits the next run of a failed or cancelled job: its last request with `changes` in it.

        URLs that were kept without their signature are signed again where they are in the own bucket; others must be
        among the changes. A job that waits, runs or has succeeded is returned as it is, a duplicate, unless the
        changes make it another request. `request` and `run` stand in for what Redis knows of the last run and the
        number of the next one: with both, it may have forgotten the job. Raises RequestRefused, JobConflict,
        JobUnknown, QueueFull.
        """
        payload = None if request is None else request.encode()
        if payload is None or run is None:
            record = await self._record(job_id)
            if record.state not in (JobState.FAILED, JobState.CANCELLED):
                if request is None and not changes and run in (None, record.run):
                    return await self._duplicate(record)
                run = run or record.run
            payload = payload or record.payload
            run = run or record.run + 1
            priority = priority or record.priority
        draft = follow_up(payload, changes, self.storage, self._now())
        if draft.job_id != job_id:
            raise RequestRefused(f"the request is not one of the job {job_id}", job_id=job_id)
        (reply,) = await self.queue.submit([draft], run=run, priority=priority or Priority.NORMAL)
        outcome = job_or_error(job_id, reply)
        if isinstance(outcome, ProducerError):
            raise outcome
        await self._wake_for([outcome])
        return outcome

    async def status(self, job_id: str) -> JobStatus:
        """Raises JobUnknown."""
        return JobStatus.of(await self._record(job_id))

    async def events(self, job_id: str, *, run: int | None = None) -> AsyncGenerator[Progress | TerminalEvent, None]:
        """Yields the progress of a job and, last, the terminal event of `run` (the present one if None).

        Steps begin anew when a later attempt does. Outages of Redis are waited out once the job has been found.
        Raises JobUnknown, EventError.
        """
        record = await self._record(job_id)
        async with aclosing(watch(self.queue, self._connect_reader, record, run or record.run)) as items:
            async for item in items:
                yield item

    async def result(
        self,
        job_id: str,
        *,
        timeout_s: float | None = None,
        run: int | None = None,
        cancel_on_timeout: bool = False,
    ) -> SucceededEvent:
        """Waits until the run (the present one if None) has ended.

        Raises JobFailed, JobCancelled, JobUnknown, EventError, and WaitTimeout after `timeout_s` seconds: the job goes
        on then, unless `cancel_on_timeout` is set.
        """
        record = await self._record(job_id)
        deadline = asyncio.timeout(timeout_s)
        try:
            async with deadline, aclosing(watch(self.queue, self._connect_reader, record, run or record.run)) as items:
                event = [item async for item in items if not isinstance(item, Progress)][-1]
        except TimeoutError:
            if not deadline.expired():
                raise
            if cancel_on_timeout:
                await self.cancel(job_id)
            raise WaitTimeout(f"the job {job_id} has not ended within {timeout_s} s", job_id=job_id) from None
        return picture_or_raise(event)

    async def cancel(self, job_id: str) -> CancelOutcome:
        """Ends a job that waits, asks the consumer of one that does not, and leaves one that has ended as it is.

        A job that nothing is known of is asked for all the same: an entry that was added by hand has no state before
        a consumer reaches it. Raises JobUnknown where `job_id` cannot be one.
        """
        if not is_job_id(job_id):
            raise JobUnknown("this is not a job id")
        while True:
            record = await self.queue.job(job_id)
            if record is not None and record.state.terminal:
                return CancelOutcome(job_id, CancelVerdict.ENDED, record.state)
            if record is not None and record.state in (JobState.QUEUED, JobState.DELAYED):
                if await self.queue.cancel_waiting(record, *cancellation(record, self._now())):
                    return CancelOutcome(job_id, CancelVerdict.CANCELLED, record.state)
                continue
            state = await self.queue.ask_to_cancel(job_id)
            if state in (None, JobState.PREPARING, JobState.RUNNING):
                return CancelOutcome(job_id, CancelVerdict.ASKED, state)

    async def _duplicate(self, record: JobRecord) -> Job:
        job = Job(record.job_id, record.run, record.state, duplicate=True)
        await self._wake_for([job])
        return job

    async def _record(self, job_id: str) -> JobRecord:
        record = await self.queue.job(job_id) if is_job_id(job_id) else None
        if record is None:
            raise JobUnknown(f"nothing is known of a job {job_id}", job_id=job_id)
        return record

    async def _wake_for(self, outcomes: Iterable[Job | ProducerError]) -> None:
        # A duplicate may be the answer to a submission whose reply was lost, before anybody was woken.
        if self._wake is None or not any(isinstance(job, Job) and job.state == JobState.QUEUED for job in outcomes):
            return
        try:
            await self._wake()
        except Exception as error:
            log.warning("wake_failed", error=type(error).__name__)


def _checked(source: GenerationRequest | Mapping[str, Any]) -> GenerationRequest | RequestRefused:
    try:
        return make_request(source)
    except RequestRefused as error:
        return error
