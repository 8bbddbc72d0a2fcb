"""Bad inputs and how they must end: what a consumer's own code makes of an entry, up to the event that it publishes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from aiohttp import ClientSession

from consumer.errors import WorkerError
from consumer.lora.cache import LoraCache
from consumer.lora.fetch import LoraFetcher
from consumer.outcomes import Outcomes, RetryPolicy
from consumer.queue import Begun, Delivery, Held, Lease, Leases
from schemas import events
from schemas.entries import RequestEntry, decode_entry
from schemas.errors import ErrorCode
from schemas.events import FailedEvent, TerminalEvent
from schemas.keys import JobState
from schemas.net.urls import HostRules

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
JOB_ID = "the-job"
CANARY = "c4n4ryS1gnature"
SIGNED = f"https://account.r2.example/loras/a.safetensors?X-Amz-Signature={CANARY}"
_PLENTY = 1 << 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a `generation.failed` event says."""

    code: ErrorCode
    retry_after: int | None
    dead_lettered: bool


FINE = None
REFUSED = Outcome(ErrorCode.INVALID_REQUEST, None, dead_lettered=False)
BAD_PROMPT = Outcome(ErrorCode.INVALID_PROMPT, None, dead_lettered=False)
FORBIDDEN = Outcome(ErrorCode.LORA_DOWNLOAD_FAILED, None, dead_lettered=False)
SIGN_AGAIN = Outcome(ErrorCode.LORA_DOWNLOAD_FAILED, 0, dead_lettered=True)
OUT_OF_REACH = Outcome(ErrorCode.LORA_DOWNLOAD_FAILED, 60, dead_lettered=True)


@dataclass(frozen=True, slots=True)
class Case:
    """An entry of a request stream, and how its job ends.

    `outcome` FINE: the request is taken. `named`: a job id can be read from the entry; without one it is a dead letter,
    and `outcome` is what it comes to once a `job_id` stands beside the payload. `fields`: what a caller of the client
    would give; None where no caller can.
    """

    name: str
    entry: Mapping[bytes, bytes]
    outcome: Outcome | None
    named: bool = True
    fields: Mapping[str, Any] | None = None

    def bare(self, job_id: str = JOB_ID) -> dict[bytes, bytes]:
        """The entry, for the job `job_id`, which is as long as `JOB_ID`: sizes stay as they are."""
        return {name: value.replace(JOB_ID.encode(), job_id.encode()) for name, value in self.entry.items()}

    def beside_its_id(self, job_id: str = JOB_ID) -> dict[bytes, bytes]:
        """The entry with the job's id beside the payload, unless it has something else there."""
        return {b"job_id": job_id.encode(), **self.bare(job_id)}


def payload(**fields: Any) -> bytes:
    """A request with a signed URL in it, as JSON."""
    return json.dumps({"job_id": JOB_ID, "prompt": "a lighthouse", "webhook_url": SIGNED, **fields}).encode()


def payload_with(members: str | bytes) -> bytes:
    """A request with `members` written into its JSON as they are."""
    text = members.encode() if isinstance(members, str) else members
    return payload()[:-1] + b", " + text + b"}"


def case_name(case: Case) -> str:
    return case.name


class RecordingLeases:
    """Takes the place of `Leases`: every run may be ended, and what is published is kept."""

    def __init__(self) -> None:
        self.ended: list[tuple[JobState, TerminalEvent, bytes, bool]] = []

    async def finish(self, lease: Lease, state: JobState, event: TerminalEvent, payload: bytes, *, dead: bool) -> Held:
        self.ended.append((state, event, payload, dead))
        return Held.OK


async def failed(entry: RequestEntry, error: BaseException | None = None) -> Outcome:
    """How the run ends that `error` breaks, at its last attempt; without one, the run that `entry` refuses."""
    leases = RecordingLeases()
    outcomes = Outcomes(cast(Leases, leases), "ann", RetryPolicy(max_attempts=1, base_s=1, cap_s=1), now=lambda: NOW)
    begun = Begun("ok", 1) if error else Begun("refused")
    lease = Lease(Delivery("{t}:requests:normal", "1-1", {}), entry.job_id or "", "ann#1")
    await outcomes.end(lease, entry, begun, error or outcomes.of_verdict(entry, begun))
    [(state, event, kept, dead)] = leases.ended
    assert isinstance(event, FailedEvent)
    published = event.encode()
    assert state is JobState.FAILED
    assert events.decode_event(published) == event
    assert b"\\u0000" not in published
    assert CANARY.encode() not in published + kept
    assert dead is event.data.dead_lettered
    assert event.data.error
    return Outcome(event.data.error_code, event.data.retry_after, event.data.dead_lettered)


async def judged(entry: Mapping[bytes, bytes]) -> Outcome | None:
    """What a consumer makes of an entry before it looks at any URL."""
    decoded = decode_entry(entry)
    return FINE if decoded.error is None else await failed(decoded)


async def fetched(
    session: ClientSession, folder: Path, url: str, rules: HostRules, *, now: datetime = NOW
) -> Outcome | None:
    """How a job ends whose LoRA is at `url`; FINE where it can be fetched."""
    entry = decode_entry({b"payload": payload(lora_url=url)})
    if entry.request is None:
        return await failed(entry)
    cache = LoraCache(folder, _PLENTY)
    fetcher = LoraFetcher(session, cache, rules=rules, own_bucket=None, max_bytes=_PLENTY, now=lambda: now)
    try:
        async with fetcher.fetch(entry.request.lora_refs[0]):
            return FINE
    except WorkerError as error:
        return await failed(entry, error)
