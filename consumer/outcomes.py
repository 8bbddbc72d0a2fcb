"""How an attempt ends: which event, and which step of the protocol, an error turns into."""

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import structlog
from redis.exceptions import RedisError

from consumer.errors import (
    HandedBack,
    InternalError,
    JobCancelled,
    LeaseLost,
    RetryableError,
    RunExpired,
    WorkerError,
    WorkerLost,
)
from consumer.outage import until_answered
from consumer.queue import Begun, Held, Lease, Leases
from schemas import events
from schemas.entries import RequestEntry
from schemas.errors import ERROR_TABLE
from schemas.events import CancelledData, FailedData, RetryingData, SucceededData
from schemas.keys import JobState
from schemas.redact import redact_bytes
from schemas.requests import MAX_PAYLOAD_BYTES, RequestError

log = structlog.get_logger(__name__)

_KNOWN = (LeaseLost, HandedBack, JobCancelled, WorkerError, RequestError)


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """`min(cap, base * 2^(attempt-1))` with full jitter; a delay that was asked for is honoured up to the cap."""

    max_attempts: int
    base_s: float
    cap_s: float
    uniform: Callable[[float, float], float] = random.uniform

    def may_retry(self, error: WorkerError, attempt: int) -> bool:
        """Whether consumers try again after this attempt (the first is 1)."""
        bound = ERROR_TABLE[error.code].max_attempts or self.max_attempts
        return isinstance(error, RetryableError) and attempt < min(bound, self.max_attempts)

    def delay_s(self, error: WorkerError, attempt: int) -> float:
        """Seconds until the next attempt."""
        asked_s = error.delay_s if isinstance(error, RetryableError) and error.delay_s is not None else 0.0
        return max(self.uniform(0.0, min(self.cap_s, self.base_s * 2.0 ** (attempt - 1))), min(self.cap_s, asked_s))


class Outcomes:
    """Publishes what became of an attempt, by the one atomic step that fits. Lives through a Redis that is away."""

    def __init__(
        self, leases: Leases, consumer: str, policy: RetryPolicy, now: Callable[[], datetime] = _utc_now
    ) -> None:
        self._leases = leases
        self._consumer = consumer
        self._policy = policy
        self._now = now

    async def succeed(self, lease: Lease, entry: RequestEntry, data: SucceededData) -> None:
        """Publishes `generation.succeeded`."""
        await self._finish(lease, entry, JobState.SUCCEEDED, events.succeeded(data, self._now()), dead=False)

    async def end(self, lease: Lease, entry: RequestEntry, begun: Begun, error: BaseException) -> None:
        """Ends the attempt that `error` broke: retried, failed, cancelled, handed back, or left to its new owner."""
        if isinstance(error, RedisError):
            # Not cured by repeating: nothing can be published. The lease runs out, and attempts are bounded.
            log.error("job.abandoned", exc_info=error)
            return
        known = error if isinstance(error, _KNOWN) else _defect(error, entry)
        _forget_frames(error)
        match known:
            case LeaseLost():
                log.warning("lease.lost")
            case HandedBack():
                await until_answered(lambda: self._leases.release(lease), what="release")
                log.info("job.handed_back")
            case JobCancelled():
                data = CancelledData(**self._base(lease, entry, begun.attempt), stage=known.stage)
                await self._finish(lease, entry, JobState.CANCELLED, events.cancelled(data, self._now()), dead=False)
            case WorkerError() if self._policy.may_retry(known, begun.attempt):
                await self._retry(lease, entry, begun, known)
            case WorkerError():
                await self._fail(lease, entry, begun, known.code, str(known), known.details, known.retry_after_s)
            case RequestError():
                await self._fail(lease, entry, begun, known.code, str(known), known.details, None)

    def of_verdict(self, entry: RequestEntry, begun: Begun) -> Exception:
        """The error that a verdict of `begin` other than ok, lost and duplicate stands for."""
        match begun.verdict:
            case "cancelled":
                return JobCancelled(begun.state)
            case "refused" if entry.error is not None:
                return entry.error
            case "expired":
                return RunExpired("the request expired before its first attempt began")
            case "exhausted":
                return WorkerLost(f"consumers died on this job {begun.attempt} times")
            case _:
                return InternalError(f"begin answered {begun.verdict}")

    def _base(self, lease: Lease, entry: RequestEntry, attempt: int) -> dict[str, Any]:
        return {
            "job_id": lease.job_id,
            "run": entry.run,
            "attempt": attempt,
            "consumer": self._consumer,
            "request_metadata": entry.metadata,
        }

    async def _retry(self, lease: Lease, entry: RequestEntry, begun: Begun, error: WorkerError) -> None:
        delay_s = self._policy.delay_s(error, begun.attempt)
        data = RetryingData(
            **self._base(lease, entry, begun.attempt),
            error=str(error),
            error_code=error.code,
            details=error.details,
            retry_after=round(delay_s, 3),
        )
        event = events.retrying(data, self._now())
        held = await until_answered(lambda: self._leases.retry(lease, event, delay_s), what="retry")
        log.warning("job.retrying", error_code=error.code, error=str(error), delay_s=round(delay_s, 3), held=held)

    async def _fail(
        self,
        lease: Lease,
        entry: RequestEntry,
        begun: Begun,
        code: Any,
        message: str,
        details: dict[str, Any],
        retry_after_s: int | None,
    ) -> None:
        dead = retry_after_s is not None
        data = FailedData(
            **self._base(lease, entry, begun.attempt),
            error=message,
            error_code=code,
            details=details,
            retry_after=retry_after_s,
            dead_lettered=dead,
        )
        await self._finish(lease, entry, JobState.FAILED, events.failed(data, self._now()), dead=dead)

    async def _finish(
        self, lease: Lease, entry: RequestEntry, state: JobState, event: events.TerminalEvent, *, dead: bool
    ) -> None:
        payload = entry.request.redacted().encode() if entry.request else redact_bytes(entry.raw[:MAX_PAYLOAD_BYTES])
        held = await until_answered(lambda: self._leases.finish(lease, state, event, payload, dead=dead), what="finish")
        if held is Held.LOST:
            log.warning("lease.lost", unpublished=event.type)
        else:
            why = event.data.model_dump(include={"error_code", "error"})
            log.info("job.ended", event_type=event.type, attempt=event.data.attempt, **why)


def _forget_frames(error: BaseException) -> None:
    """Its own, and those of what it came of: they are of no more use, and keep the job's LoRAs on the GPU."""
    error.__context__ = error.__cause__ = error.__traceback__ = None


def _defect(error: BaseException, entry: RequestEntry) -> InternalError:
    trace_id = entry.traceparent.split("-")[1] if entry.traceparent and entry.traceparent.count("-") == 3 else None
    trace_id = trace_id or uuid.uuid4().hex
    log.error("job.defect", trace_id=trace_id, exc_info=error)
    return InternalError(f"{type(error).__name__} in the consumer", details={"trace_id": trace_id})
