"""What the client says about jobs. All of it is frozen; times are aware datetimes in UTC."""

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Self

from producer.queue import JobRecord
from schemas.events import Event, EventError, decode_event
from schemas.keys import JobState, Priority


@dataclass(frozen=True, slots=True)
class Job:
    """A run that is in the queue. `duplicate`: it was there before, and `state` is how far it has come."""

    job_id: str
    run: int
    state: JobState
    duplicate: bool


@dataclass(frozen=True, slots=True)
class Progress:
    """Denoising step `step` of `total` is done; `eta_s` seconds are left, as the consumer guesses."""

    step: int
    total: int
    eta_s: float


class CancelVerdict(StrEnum):
    """`cancelled`: ended by this call; `asked`: a consumer will end it; `ended`: it had ended before."""

    CANCELLED = "cancelled"
    ASKED = "asked"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class CancelOutcome:
    """`state` is what the cancellation found, None where nothing is known of the job (yet)."""

    job_id: str
    verdict: CancelVerdict
    state: JobState | None


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job as it stands. `event` is the terminal event of a run that has ended, None where it cannot be read."""

    job_id: str
    state: JobState
    run: int
    attempt: int
    priority: Priority
    submitted_at: datetime
    ended_at: datetime | None
    consumer: str | None
    event: Event | None

    @classmethod
    def of(cls, record: JobRecord) -> Self:
        return cls(
            job_id=record.job_id,
            state=record.state,
            run=record.run,
            attempt=record.attempt,
            priority=record.priority,
            submitted_at=_time(record.submitted_at_ms),
            ended_at=None if record.ended_at_ms is None else _time(record.ended_at_ms),
            consumer=record.consumer,
            event=_event(record.event),
        )


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def _event(payload: bytes | None) -> Event | None:
    if payload is None:
        return None
    try:
        return decode_event(payload)
    except EventError:
        return None
