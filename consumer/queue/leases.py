"""Beginning, keeping and ending runs: every step is one atomic script, fenced by the lease."""

import itertools
import math
import uuid
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from redis.asyncio import Redis

from consumer import failpoints
from consumer.queue import scripts
from consumer.queue.intake import Delivery
from schemas.events import RetryingEvent, StartedEvent, TerminalEvent
from schemas.keys import CONSUMER_GROUP, PROGRESS_MAX_ENTRIES, PROGRESS_TTL_SECONDS, JobState, Keys

RELEASED = "released"
_RELEASED_IDLE_MS = 10**9
_SCRIPTS = ("BEGIN", "START", "PROGRESS", "EXTEND", "FINISH", "RETRY", "RELEASE", "BURY", "NOTE_UPLOAD")


class Held(StrEnum):
    """What a fenced step answers. CANCEL: still ours, but somebody asked for the job's cancellation."""

    OK = "ok"
    CANCEL = "cancel"
    LOST = "lost"


class Begun(NamedTuple):
    """The answer of `begin`. `verdict` is one of lost, duplicate, cancelled, refused, expired, exhausted, ok.

    Times are milliseconds of the server's clock; `state` is the job's before this begin.
    """

    verdict: str
    attempt: int = 0
    submitted_at_ms: int = 0
    now_ms: int = 0
    state: JobState = JobState.QUEUED


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to end one run: valid while the entry is ours and the job's hash carries this `token`.

    An empty token stands for an entry that was read and not begun yet.
    """

    delivery: Delivery
    job_id: str = ""
    token: str = ""


class Leases:
    """The life of a run for one consumer name. Whatever raises redis.RedisError may be called again."""

    def __init__(self, redis: Redis, keys: Keys, name: str, *, job_ttl_s: float) -> None:
        self._keys = keys
        self._name = name
        self._job_ttl_ms = math.ceil(job_ttl_s * 1000)
        self._boot = uuid.uuid4().hex[:8]  # whoever has the same name, by a restored snapshot say, has other tokens
        self._tokens = itertools.count(1)
        self._scripts = {script: redis.register_script(getattr(scripts, script)) for script in _SCRIPTS}

    def lease(self, delivery: Delivery, job_id: str) -> Lease:
        """A fresh lease for one begin, which makes it valid."""
        return Lease(delivery, job_id, f"{self._name}#{self._boot}-{next(self._tokens)}")

    async def begin(
        self,
        lease: Lease,
        *,
        run: int,
        payload: bytes,
        fingerprint: str,
        max_attempts: int,
        expires_at_ms: int | None,
        valid: bool,
        traceparent: str | None = None,
    ) -> Begun:
        """Takes the job over for one attempt, and counts it if it may be made."""
        keys, job_id = self._keys, lease.job_id
        reply = await self._fenced(
            "BEGIN",
            lease,
            [keys.job(job_id), keys.cancel(job_id), keys.progress(job_id), keys.counters],
            [
                *(run, keys.priority_of(lease.delivery.stream), payload, fingerprint),
                *(max_attempts, expires_at_ms, valid, traceparent),
            ],
        )
        verdict = reply[0].decode()
        if len(reply) == 1:
            return Begun(verdict)
        _, attempt, submitted_at_ms, now_ms, state = reply
        return Begun(verdict, int(attempt), int(submitted_at_ms), int(now_ms), JobState(state.decode()))

    async def start(self, lease: Lease, event: StartedEvent) -> Held:
        """Publishes that the job has the GPU."""
        keys = [self._keys.job(lease.job_id), self._keys.cancel(lease.job_id), self._keys.completions]
        return _held(await self._fenced("START", lease, keys, [lease.job_id, event.encode()]))

    async def progress(self, lease: Lease, step: int, total: int, eta_s: float) -> Held:
        """Writes one step's progress. Looks at the token alone: the lease's owner is asked at each renewal."""
        job_id = lease.job_id
        keys = [self._keys.job(job_id), self._keys.cancel(job_id), self._keys.progress(job_id)]
        args: list[Any] = [lease.token, PROGRESS_MAX_ENTRIES, PROGRESS_TTL_SECONDS, step, total, f"{eta_s:.3f}"]
        return _held(await self._call("PROGRESS", keys, args))

    async def extend(self, lease: Lease) -> Held:
        """Renews the lease if it is still ours."""
        keys = [self._keys.job(lease.job_id), self._keys.cancel(lease.job_id)]
        return _held(await self._fenced("EXTEND", lease, keys, []))

    async def finish(self, lease: Lease, state: JobState, event: TerminalEvent, payload: bytes, *, dead: bool) -> Held:
        """Ends the run. `payload` is kept with the job and in its dead letter: it must carry no signature."""
        keys, job_id = self._keys, lease.job_id
        names = [*keys.end_of_run(job_id), keys.dead]
        args = [dead, job_id, state, event.type, event.encode(), payload, self._job_ttl_ms]
        return _held(await self._fenced("FINISH", lease, names, args))

    async def retry(self, lease: Lease, event: RetryingEvent, delay_s: float) -> Held:
        """Puts the job aside for `delay_s`."""
        keys = [self._keys.job(lease.job_id), self._keys.delayed, self._keys.completions]
        args = [lease.job_id, event.encode(), math.ceil(delay_s * 1000)]
        return _held(await self._fenced("RETRY", lease, keys, args))

    async def release(self, lease: Lease) -> Held:
        """Hands the entry back at once; a begun attempt does not count."""
        keys = [self._keys.job(lease.job_id)]
        return _held(await self._fenced("RELEASE", lease, keys, [RELEASED, _RELEASED_IDLE_MS]))

    async def bury(self, delivery: Delivery, raw: bytes) -> Held:
        """Moves an entry without a readable job id to the dead letters. `raw` must carry no signature."""
        return _held(await self._fenced("BURY", Lease(delivery), [self._keys.dead], [raw]))

    async def note_upload(self, lease: Lease, note: bytes) -> list[bytes] | None:
        """Notes the PNG of an upload that cannot be read back. A note has no line break.

        Returns what other attempts have noted, those of earlier runs too, or None where the lease is lost.
        """
        keys = [self._keys.job(lease.job_id)]
        reply: bytes = await self._call("NOTE_UPLOAD", keys, [lease.token, note])
        if reply == b"lost":
            return None
        lines = [line.split(b"\t", 1) for line in reply.splitlines()]
        return [noted for token, noted in lines if token != lease.token.encode()]

    async def _fenced(self, script: str, lease: Lease, keys: list[str], args: list[Any]) -> Any:
        stream, entry_id, _ = lease.delivery
        head = [CONSUMER_GROUP, entry_id, self._name, lease.token]
        return await self._call(script, [stream, *keys], [*head, *map(_argument, args)])

    async def _call(self, script: str, keys: list[str], args: list[Any]) -> Any:
        with failpoints.around(script.lower()):
            return await self._scripts[script](keys=keys, args=args)


def _argument(value: Any) -> Any:
    match value:
        case None:
            return ""
        case bool():
            return int(value)
        case _:
            return value


def _held(reply: bytes) -> Held:
    return Held(reply.decode())
