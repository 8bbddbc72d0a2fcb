"""Dead letters: runs that failed and could succeed, and entries from which no job could be read. See, replay, drop."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from producer.async_client import AsyncGenerationClient
from producer.errors import JobUnknown, ProducerError
from producer.jobs import JobStatus
from producer.queue import ProducerQueue, StreamEntry
from producer.requests import follow_up
from producer.stream_ids import is_stream_id, stream_time, time_of_ms
from schemas.entries import decode_entry
from schemas.errors import ErrorCode
from schemas.events import Event, EventError, decode_event
from schemas.keys import JobState, Priority
from schemas.requests import GenerationRequest

_PAGE = 500
_MAX_DIGITS = 16


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One entry of the dead letters, as far as it can be read.

    `request` is the run's request without its URLs' queries, as `payload` has it in bytes; `event` is the run's
    terminal event. An entry without a readable job has only `raw`.
    """

    entry_id: str
    job_id: str | None
    run: int | None
    request: GenerationRequest | None
    payload: bytes | None
    event: Event | None
    raw: bytes | None
    attempts: int | None
    source: str | None
    died_at: datetime

    @property
    def error_code(self) -> ErrorCode | None:
        """Why the run failed, None where the letter does not say."""
        return getattr(self.event.data, "error_code", None) if self.event else None

    @property
    def priority(self) -> Priority:
        """The priority of the stream that the job came from."""
        name = (self.source or "").rpartition(":")[2]
        return Priority(name) if name in tuple(Priority) else Priority.NORMAL


class Verdict(StrEnum):
    """What became of a letter that was to be replayed. REPLAYED and ALREADY remove it, the others keep it."""

    REPLAYED = "replayed"
    WOULD_REPLAY = "would_replay"
    ALREADY = "already"
    REFUSED = "refused"
    UNDECODABLE = "undecodable"


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """`run` is the run that follows the dead one, where there is (or would be) one; `reason` is for people."""

    entry_id: str
    job_id: str | None
    verdict: Verdict
    run: int | None = None
    reason: str | None = None


def decode_dead_letter(entry: StreamEntry) -> DeadLetter:
    """Reads a dead letter, whatever is in it."""
    fields = entry.fields
    died_at_ms = _number(fields.get(b"died_at"))
    read = decode_entry(fields)
    return DeadLetter(
        entry_id=entry.entry_id,
        job_id=read.job_id,
        run=_number(fields.get(b"run")),
        request=read.request,
        payload=fields.get(b"payload"),
        event=_event(fields.get(b"event")),
        raw=fields.get(b"raw"),
        attempts=_number(fields.get(b"attempts")),
        source=_text(fields.get(b"source")),
        died_at=stream_time(entry.entry_id) if died_at_ms is None else time_of_ms(died_at_ms),
    )


async def list_dead(
    queue: ProducerQueue, *, error_code: ErrorCode | None = None, limit: int | None = None
) -> list[DeadLetter]:
    """Dead letters in order of death, the oldest first.

    Raises redis.RedisError.
    """
    found: list[DeadLetter] = []
    after = "-"
    while limit is None or len(found) < limit:
        page = await queue.dead_letters(after, _PAGE)
        if not page:
            break
        letters = map(decode_dead_letter, page)
        found += [letter for letter in letters if error_code is None or letter.error_code == error_code]
        after = page[-1].entry_id
    return found[:limit]


async def show(queue: ProducerQueue, entry_id: str) -> DeadLetter:
    """One dead letter.

    Raises JobUnknown where there is none with this entry id, redis.RedisError.
    """
    entry = await queue.dead_letter(entry_id) if is_stream_id(entry_id) else None
    if entry is None:
        raise JobUnknown("there is no dead letter with this entry id")
    return decode_dead_letter(entry)


async def drop(queue: ProducerQueue, entry_ids: Iterable[str]) -> int:
    """Removes dead letters for good; returns how many there were.

    Raises redis.RedisError.
    """
    return sum([await queue.drop_dead_letter(entry_id) for entry_id in entry_ids if is_stream_id(entry_id)])


async def replay(
    client: AsyncGenerationClient,
    queue: ProducerQueue,
    letters: Iterable[DeadLetter],
    *,
    changes: Mapping[str, Any] | None = None,
    dry_run: bool = False,
) -> list[ReplayResult]:
    """Submits the run that follows each dead one: the same request with `changes`, own URLs signed again.

    A letter makes at most one run, its own number + 1, however often it is replayed, by whomever; the letter goes once
    that run exists. A dry run writes nothing. Raises redis.RedisError: what was done stays done, and the same call goes
    on from there; ValueError where `changes` has a `job_id`.
    """
    if changes and "job_id" in changes:
        raise ValueError("a replay keeps its job_id")
    results = []
    for letter in letters:
        result = await _replay_one(client, queue, letter, changes or {}, dry_run=dry_run)
        if result.verdict in (Verdict.REPLAYED, Verdict.ALREADY) and not dry_run:
            await queue.drop_dead_letter(letter.entry_id)
        results.append(result)
    return results


async def _replay_one(
    client: AsyncGenerationClient,
    queue: ProducerQueue,
    letter: DeadLetter,
    changes: Mapping[str, Any],
    *,
    dry_run: bool,
) -> ReplayResult:
    job_id, run, request = letter.job_id, letter.run, letter.request
    if job_id is None or run is None or request is None:
        return ReplayResult(letter.entry_id, job_id, Verdict.UNDECODABLE, None, "no request can be read from it")
    superseded = await _superseded(queue, letter, job_id, run)
    if superseded is not None:
        return superseded
    try:
        follower = follow_up(request.encode(), changes, client.storage, datetime.now(UTC))
        if dry_run:
            return ReplayResult(letter.entry_id, job_id, Verdict.WOULD_REPLAY, run + 1)
        job = await client.resubmit(job_id, request=follower, run=run + 1, priority=letter.priority)
    except ProducerError as error:
        return ReplayResult(letter.entry_id, job_id, Verdict.REFUSED, None, str(error))
    return ReplayResult(letter.entry_id, job_id, Verdict.ALREADY if job.duplicate else Verdict.REPLAYED, job.run)


async def _superseded(queue: ProducerQueue, letter: DeadLetter, job_id: str, run: int) -> ReplayResult | None:
    """The result for a letter whose run is no longer the job's last word, None where it is, or has expired."""
    record = await queue.job(job_id)
    if record is None:
        return None
    job = JobStatus.of(record)
    ended_so = job.run == run and job.state in (JobState.FAILED, JobState.CANCELLED)
    if ended_so and job.event == letter.event:
        return None
    if ended_so or job.run < run:
        reason = "the id has expired and is another job's now"
        return ReplayResult(letter.entry_id, job_id, Verdict.REFUSED, None, reason)
    return ReplayResult(letter.entry_id, job_id, Verdict.ALREADY, job.run, f"run {job.run} is {job.state}")


def _event(payload: bytes | None) -> Event | None:
    try:
        return decode_event(payload) if payload is not None else None
    except EventError:
        return None


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "replace")


def _number(value: bytes | None) -> int | None:
    return int(value) if value is not None and value.isdigit() and len(value) <= _MAX_DIGITS else None
