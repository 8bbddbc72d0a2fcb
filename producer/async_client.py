"""The backend's client: submit jobs, look at them, wait for them, cancel them."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from datetime import UTC, datetime
from functools import partial
from typing import Any, Self, Unpack

from redis.asyncio import Redis

from producer import cancelling
from producer.errors import JobUnknown, ProducerError, RequestRefused
from producer.jobs import CancelOutcome, Job, JobStatus, Progress
from producer.limits import Limits
from producer.queue import JobRecord, ProducerQueue, connect, connect_for_blocking_reads
from producer.requests import RequestChanges, RequestFields, check, follow_up, own_url_expired
from producer.settings import ProducerSettings
from producer.storage import PresignedUrls
from producer.submissions import QueueLimits
from producer.verdicts import error_of, job_or_error, picture_or_raise, taken
from producer.waiting import BLOCK_S, end_within, first_look, heeding_cancellation, watch
from producer.waking import Wake, wake_for
from schemas.entries import is_traceparent
from schemas.events import FailedEvent, SucceededEvent, TerminalEvent
from schemas.fields import is_job_id
from schemas.keys import JobState, Keys, Priority
from schemas.requests import GenerationRequest

_BATCH = 100


def _now() -> datetime:
    return datetime.now(UTC)


class AsyncGenerationClient:
    """One queue, as a backend sees it. Use it as an async context manager, in one event loop.

    `wake` is called after a submission that leaves a job queued; whatever it raises is logged only. `storage` signs
    what is in the own bucket. `for_callers` is the gateway's: see `ProducerQueue`. Every method may raise
    redis.RedisError: doing it again is safe, with the same `job_id` where there is one.
    """

    def __init__(
        self,
        redis_url: str,
        *,
        prefix: str,
        limits: QueueLimits,
        job_ttl_s: float,
        storage: PresignedUrls | None = None,
        wake: Wake | None = None,
        now: Callable[[], datetime] = _now,
        for_callers: bool = False,
    ) -> None:
        self.storage = storage
        self._wake = wake
        self._now = now
        self._redis: Redis = connect(redis_url)
        self._connect_reader = partial(connect_for_blocking_reads, redis_url, block_s=BLOCK_S)
        self.queue = ProducerQueue(
            self._redis, Keys(prefix), limits=limits, job_ttl_s=job_ttl_s, for_callers=for_callers
        )

    @classmethod
    def from_settings(cls, settings: ProducerSettings, *, wake: Wake | None = None, for_callers: bool = False) -> Self:
        return cls(
            settings.redis_url.get_secret_value(),
            prefix=settings.prefix,
            limits=settings.limits,
            job_ttl_s=settings.job_ttl_s,
            storage=PresignedUrls.from_settings(settings),
            wake=wake,
            for_callers=for_callers,
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
        presign: bool = False,
        traceparent: str | None = None,
        **fields: Unpack[RequestFields],
    ) -> Job:
        """Submits a request, or the one that `fields` describe: once per `job_id`, however often it is called.

        `presign` replaces a LoRA's key by a freshly signed URL, for consumers that cannot read the bucket themselves.
        `traceparent` is a W3C trace context. Raises RequestRefused, JobConflict (the id has another body), QueueFull.
        """
        if request is not None and fields:
            raise TypeError("submit takes a request or its fields, not both")
        source = fields if request is None else request
        (job,) = await self.submit_many([source], priority=priority, presign=presign, traceparent=traceparent)
        return taken(job)

    async def submit_many(
        self,
        requests: Iterable[GenerationRequest | RequestFields | Mapping[str, Any]],
        *,
        priority: Priority = Priority.NORMAL,
        presign: bool = False,
        traceparent: str | None = None,
    ) -> list[Job | ProducerError]:
        """Submits in batches of a hundred, one after the other, each in one round trip.

        A request that is not taken becomes the error in its place. Where Redis fails in between, some are queued:
        submitting all of them again is safe if they have ids of their own. Raises RequestRefused for `traceparent`.
        """
        if traceparent is not None and not is_traceparent(traceparent):
            raise RequestRefused("traceparent is not a W3C trace context", details={"field": "traceparent"})
        sources = list(requests)
        if presign:  # it computes, and builds boto3's client the first time
            checked = await asyncio.to_thread(check, sources, self.storage, presign=True)
        else:
            checked = check(sources)
        good = [request for request in checked if isinstance(request, GenerationRequest)]
        outcomes: list[Job | ProducerError] = []
        for start in range(0, len(good), _BATCH):
            batch = good[start : start + _BATCH]
            replies = await self.queue.submit(batch, priority=priority, traceparent=traceparent)
            outcomes += [job_or_error(request.job_id, reply) for request, reply in zip(batch, replies, strict=True)]
        await wake_for(self._wake, outcomes)
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
                    job = Job(job_id, record.run, record.state, duplicate=True)
                    await wake_for(self._wake, [job])
                    return job
                run = run or record.run
            payload = payload or record.payload
            run = run or record.run + 1
            priority = priority or record.priority
        try:
            draft = await asyncio.to_thread(follow_up, payload, changes, self.storage, self._now())
        except RequestRefused as error:
            error.job_id = job_id
            raise
        if draft.job_id != job_id:
            raise RequestRefused(f"the request is not one of the job {job_id}", job_id=job_id)
        (reply,) = await self.queue.submit([draft], run=run, priority=priority or Priority.NORMAL)
        job = taken(job_or_error(job_id, reply))
        await wake_for(self._wake, [job])
        return job

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
        queue_timeout_s: float | None = None,
        run_timeout_s: float | None = None,
        run: int | None = None,
        cancel_on_timeout: bool = False,
        resign: bool = False,
    ) -> SucceededEvent:
        """Waits until the run (the present one if None) has ended.

        Raises JobFailed, JobCancelled, JobUnknown, EventError, and WaitTimeout where one of the limits passes, counted
        from this call: `queue_timeout_s` until the job has the GPU for the first time, `run_timeout_s` from then on,
        retries and their delays included, `timeout_s` altogether; `details["limit"]` is queue, run or total. The job
        goes on then, unless `cancel_on_timeout` is set; one that ends before its cancellation is a result after all.

        `resign`: a run that failed because its URL into the own bucket had expired is resubmitted, once, and its next
        run is waited for within the same limits. Where it cannot be, JobFailed is raised from the reason.
        """
        now_s = asyncio.get_running_loop().time()
        limits = Limits(now_s, queue_timeout_s=queue_timeout_s, run_timeout_s=run_timeout_s, timeout_s=timeout_s)
        record = await first_look(limits, job_id, self._record)
        cancel = self.cancel if cancel_on_timeout else None
        end = partial(end_within, limits, self.queue, self._connect_reader, cancel)
        event = await end(record, run or record.run)
        if resign and isinstance(event, FailedEvent) and (job := await self._signed_again(event)) is not None:
            event = await end(await first_look(limits, job_id, self._record), job.run)
        return picture_or_raise(event)

    async def cancel(self, job_id: str) -> CancelOutcome:
        """Ends a job that waits, asks the consumer of one that does not, and leaves one that has ended as it is.

        A job that nothing is known of is asked for all the same: an entry that was added by hand has no state before
        a consumer reaches it. Raises JobUnknown where `job_id` cannot be one.
        """
        if not is_job_id(job_id):
            raise JobUnknown("this is not a job id")
        return await cancelling.cancel(self.queue, job_id, self._now)

    async def _signed_again(self, failed: FailedEvent) -> Job | None:
        """The run after one that failed because its own URL had expired; None where it failed of something else."""
        job_id = failed.data.job_id
        try:
            record = await self._record(job_id)
            if not own_url_expired(failed, record.payload, self.storage):
                return None
            return await self.resubmit(job_id, run=failed.data.run + 1)
        except ProducerError as reason:
            raise error_of(failed) from reason

    async def _record(self, job_id: str) -> JobRecord:
        record = await heeding_cancellation(self.queue.job(job_id)) if is_job_id(job_id) else None
        if record is None:
            raise JobUnknown(f"nothing is known of a job {job_id}", job_id=job_id)
        return record
