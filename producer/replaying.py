"""The replay of dead letters, one by one: what becomes of each, and how fast they go."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from producer.errors import ProducerError, QueueFull, RequestRefused
from producer.jobs import Job, JobStatus
from producer.letters import DeadLetter, decode_dead_letter
from producer.queue import ProducerQueue
from producer.requests import follow_up
from producer.storage import PresignedUrls
from producer.stream_ids import is_stream_id
from producer.verdicts import job_or_error
from schemas.errors import ErrorCode
from schemas.keys import JobState
from schemas.requests import GenerationRequest

_ANY_REQUEST = b'{"job_id":"any","prompt":"any"}'


class Verdict(StrEnum):
    """What became of a letter that was to be replayed. REPLAYED and ALREADY remove it, the others leave it.

    ALREADY: a later run of the job exists. GONE: there is no such letter (any more). REFUSED: `reason` says what is to
    be changed first. UNDECODABLE: no request can be read from it. QUEUE_FULL: nothing can be replayed for now.
    """

    REPLAYED = "replayed"
    WOULD_REPLAY = "would_replay"
    ALREADY = "already"
    GONE = "gone"
    REFUSED = "refused"
    UNDECODABLE = "undecodable"
    QUEUE_FULL = "queue_full"


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """`run` follows the dead one, where it exists (or would); `error_code` is the letter's; `reason` is for people.

    `retry_after`: seconds after which a queue that was full, or the tenant's part of it, may have room.
    """

    entry_id: str
    job_id: str | None
    verdict: Verdict
    run: int | None = None
    error_code: ErrorCode | None = None
    reason: str | None = None
    retry_after: int | None = None


class Pace:
    """Lets at most `rate_per_s` jobs per second go (None: any number), none in a burst, until `stop` is set.

    Raises ValueError for a rate that is not above 0.
    """

    def __init__(
        self,
        rate_per_s: float | None = None,
        *,
        stop: asyncio.Event | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] | None = None,
    ) -> None:
        if rate_per_s is not None and not rate_per_s > 0:
            raise ValueError("the rate is above 0 jobs per second")
        self._interval_s = 0.0 if rate_per_s is None else 1 / rate_per_s
        self._stop = stop or asyncio.Event()
        self._clock = clock
        self._sleep = sleep or self._sleep_until_stopped
        self._next_s = clock()

    async def turn(self) -> bool:
        """Waits until the next job may go; whether one may."""
        wait_s = self._next_s - self._clock()
        if wait_s > 0 and not self._stop.is_set():
            await self._sleep(wait_s)
        return not self._stop.is_set()

    def went(self) -> None:
        """A job went: the next one has to wait."""
        self._next_s = self._clock() + self._interval_s

    async def _sleep_until_stopped(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stop.wait()
        except TimeoutError:
            pass


class Replayer:
    """Submits the run that follows a dead one: the same request with `changes` in it, own URLs signed again.

    A letter makes at most one run, its own number + 1, however often it is replayed, by whomever: the run is submitted
    and its letter removed in one atomic step. A dry run writes nothing. Raises RequestRefused for changes that no
    request can take.
    """

    def __init__(
        self,
        queue: ProducerQueue,
        *,
        storage: PresignedUrls | None = None,
        changes: Mapping[str, Any] | None = None,
        dry_run: bool = False,
    ) -> None:
        self._queue = queue
        self._storage = storage
        self._changes = changes or {}
        self._dry_run = dry_run
        _check(self._changes)

    async def replay(self, entry_id: str) -> ReplayResult:
        """Replays one letter.

        Raises redis.RedisError; the same call again is safe.
        """
        entry = await self._queue.dead_letter(entry_id) if is_stream_id(entry_id) else None
        if entry is None:
            return ReplayResult(entry_id, None, Verdict.GONE, reason="there is no dead letter with this entry id")
        letter = decode_dead_letter(entry)
        job_id, run, request = letter.job_id, letter.run, letter.request
        if job_id is None or run is None or request is None:
            return _result(letter, Verdict.UNDECODABLE, reason="no request can be read from it")
        result = await self._superseded(letter, job_id, run) or await self._submit(letter, job_id, run, request)
        if result.verdict is Verdict.ALREADY and not self._dry_run:
            await self._queue.drop_dead_letters([entry_id])
        return result

    async def _submit(self, letter: DeadLetter, job_id: str, run: int, request: GenerationRequest) -> ReplayResult:
        try:
            follower = follow_up(request.encode(), self._changes, self._storage, datetime.now(UTC))
        except ProducerError as error:
            return _result(letter, Verdict.REFUSED, reason=str(error))
        if self._dry_run:
            return _result(letter, Verdict.WOULD_REPLAY, run + 1)
        reply = await self._queue.replay(letter.entry_id, follower, run=run + 1, priority=letter.priority)
        if reply.verdict == "gone":
            gone = _result(letter, Verdict.GONE, reason="the letter was removed in the meantime")
            return await self._superseded(letter, job_id, run) or gone
        outcome = job_or_error(job_id, reply)
        if isinstance(outcome, Job):
            return _result(letter, Verdict.ALREADY if outcome.duplicate else Verdict.REPLAYED, outcome.run)
        if isinstance(outcome, QueueFull):
            of_tenant = outcome.details["limit"] == "tenant"  # others may go on
            verdict = Verdict.REFUSED if of_tenant else Verdict.QUEUE_FULL
            return _result(letter, verdict, reason=str(outcome), retry_after=outcome.retry_after)
        refused = _result(
            letter, Verdict.REFUSED, reason=str(outcome)
        )  # unless somebody was faster, with other changes
        return await self._superseded(letter, job_id, run) or refused

    async def _superseded(self, letter: DeadLetter, job_id: str, run: int) -> ReplayResult | None:
        """The result for a letter whose run is not the job's last word, None where it is, or has expired."""
        record = await self._queue.job(job_id)
        if record is None:
            return None
        job = JobStatus.of(record)
        if job.run > run:
            return _result(letter, Verdict.ALREADY, job.run, reason=f"run {job.run} is {job.state}")
        if job.run == run and job.state is JobState.FAILED and job.event == letter.event:
            return None
        return _result(letter, Verdict.REFUSED, reason="the id has expired and is another job's now")


async def replay_each(
    replayer: Replayer, entry_ids: Iterable[str], pace: Pace | None = None
) -> AsyncGenerator[ReplayResult, None]:
    """Replays the letters in order, and yields what became of each. It ends where the queue is full or the pace stops.

    Raises redis.RedisError: what was done stays done, and the same call goes on from there.
    """
    pace = pace or Pace()
    for entry_id in entry_ids:
        if not await pace.turn():
            return
        result = await replayer.replay(entry_id)
        if result.verdict is Verdict.REPLAYED:
            pace.went()
        yield result
        if result.verdict is Verdict.QUEUE_FULL:
            return


def _check(changes: Mapping[str, Any]) -> None:
    if "job_id" in changes:
        raise RequestRefused("a replay keeps its job_id")
    try:
        follow_up(_ANY_REQUEST, changes, None, datetime.now(UTC))
    except RequestRefused as error:
        raise RequestRefused(str(error), error_code=error.error_code, details=error.details) from None


def _result(
    letter: DeadLetter,
    verdict: Verdict,
    run: int | None = None,
    *,
    reason: str | None = None,
    retry_after: int | None = None,
) -> ReplayResult:
    return ReplayResult(letter.entry_id, letter.job_id, verdict, run, letter.error_code, reason, retry_after)
