"""The backend's end of the queue protocol: submit, look, cancel, wait. Its scripts are in `producer.scripts`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff

from producer import scripts
from producer.backlog import LIVE_WITHIN_S
from producer.submissions import QueueLimits, Submitted, submitted
from schemas.events import CancelledEvent
from schemas.keys import CANCEL_TTL_SECONDS, CONSUMER_GROUP, JobState, Keys, Priority
from schemas.requests import GenerationRequest

_SOCKET_TIMEOUT_S = 5.0
_MAX_CONNECTIONS = 50
_CONNECTION_WAIT_S = 30.0


def connect(url: str) -> Redis:
    """A client in bytes that repeats a command whose connection was lost. Beyond `_MAX_CONNECTIONS` callers queue up.

    Raises ValueError, without the URL, where it is none of Redis, or has an option that redis-py does not know.
    """
    retry = Retry(ExponentialWithJitterBackoff(base=0.05, cap=1.0), 3)
    return _client(
        url,
        retry=retry,
        socket_timeout=_SOCKET_TIMEOUT_S,
        health_check_interval=15,
        max_connections=_MAX_CONNECTIONS,
        timeout=_CONNECTION_WAIT_S,
    )


def connect_for_blocking_reads(url: str, *, block_s: float) -> Redis:
    """A client for blocking reads: it waits longer than it blocks, and leaves repeating to its caller."""
    return _client(url, retry=Retry(NoBackoff(), 0), socket_timeout=block_s + _SOCKET_TIMEOUT_S)


def _client(url: str, *, socket_timeout: float, **options: Any) -> Redis:
    # The URL's own options go first, save two that other programs may like: this one works in bytes, and knows how
    # long it blocks.
    fixed = {"decode_responses": False, "socket_timeout": socket_timeout}
    try:
        pool = BlockingConnectionPool(**{**options, **parse_url(url), **fixed})
        pool.connection_class(**pool.connection_kwargs)  # without a network: does it know the URL's options?
    except (ValueError, TypeError, AttributeError):
        raise ValueError("not the URL of a Redis: redis://, rediss:// or unix://, with known options") from None
    return Redis.from_pool(pool)


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job's hash. Times are milliseconds of the server's clock; `event` is the run's terminal event, as published."""

    job_id: str
    state: JobState
    run: int
    attempt: int
    priority: Priority
    entry_id: str
    consumer: str | None
    payload: bytes
    submitted_at_ms: int
    ended_at_ms: int | None
    event: bytes | None


class StreamEntry(NamedTuple):
    """An entry of the completions, the dead letters or a progress stream."""

    entry_id: str
    fields: Mapping[bytes, bytes]


class ProducerQueue:
    """Submits, looks, cancels, waits. Every method may raise redis.RedisError; what it did is safe to do again.

    `for_callers`: the runs that it submits are for those who wait for them, and are cancelled when the last one leaves.
    """

    def __init__(
        self, redis: Redis, keys: Keys, *, limits: QueueLimits, job_ttl_s: float, for_callers: bool = False
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._limits = limits
        self._caller = "waits" if for_callers else ""
        self._job_ttl_ms = math.ceil(job_ttl_s * 1000)
        self._submit = redis.register_script(scripts.SUBMIT)
        self._replay = redis.register_script(scripts.REPLAY)
        self._ask_to_cancel = redis.register_script(scripts.ASK_TO_CANCEL)
        self._cancel_waiting = redis.register_script(scripts.CANCEL_WAITING)

    async def submit(
        self,
        requests: Sequence[GenerationRequest],
        *,
        run: int = 1,
        priority: Priority,
        traceparent: str | None = None,
    ) -> list[Submitted]:
        """Submits each request atomically, all of them in one round trip."""
        # without the block redis-py keeps the connection for ever where it fails before the first request is sent
        async with self._redis.pipeline(transaction=False) as pipe:
            for request in requests:
                names, args = self._submission(request, run, priority, traceparent)
                await self._submit(keys=names, args=args, client=pipe)
            replies: list[Any] = await pipe.execute()
        return [submitted(reply, self._limits) for reply in replies]

    async def replay(self, letter_id: str, request: GenerationRequest, *, run: int, priority: Priority) -> Submitted:
        """Submits the run that follows a dead one and removes its letter, atomically; nothing where that has gone."""
        names, args = self._submission(request, run, priority)
        reply: Any = await self._replay(keys=[*names, self._keys.dead], args=[*args, letter_id])
        return submitted(reply, self._limits)

    def _submission(
        self, request: GenerationRequest, run: int, priority: Priority, traceparent: str | None = None
    ) -> tuple[list[str], list[Any]]:
        """Keys and arguments of SUBMIT."""
        keys, job_id = self._keys, request.job_id
        names = [keys.job(job_id), keys.requests(priority), keys.delayed, keys.cancel(job_id), keys.progress(job_id)]
        names += [*keys.request_streams, keys.completions, keys.ended, keys.tenants]
        args = [job_id, run, request.encode(), request.fingerprint(), priority, traceparent or "", self._caller]
        limits = self._limits
        return names, [*args, request.tenant or "", limits.queue, limits.per_tenant, limits.completions]

    async def job(self, job_id: str) -> JobRecord | None:
        """What is known of a job, None if nothing (never seen, or expired)."""
        raw: dict[Any, Any] = await self._redis.hgetall(self._keys.job(job_id))
        if b"state" not in raw:
            return None
        return JobRecord(
            job_id=job_id,
            state=JobState(raw[b"state"].decode()),
            run=int(raw[b"run"]),
            attempt=int(raw[b"attempt"]),
            priority=Priority(raw[b"priority"].decode()),
            entry_id=raw[b"entry_id"].decode(),
            consumer=raw.get(b"consumer", b"").decode() or None,
            payload=raw[b"payload"],
            submitted_at_ms=int(raw[b"submitted_at"]),
            ended_at_ms=int(raw[b"ended_at"]) if b"ended_at" in raw else None,
            event=raw.get(b"event"),
        )

    async def cancel_waiting(self, job: JobRecord, event: CancelledEvent, payload: bytes) -> bool:
        """Ends a queued or delayed run if it is still where `job` says. `payload` is what is kept: no signatures."""
        keys, job_id = self._keys, job.job_id
        reply = await self._cancel_waiting(
            keys=[keys.requests(job.priority), *keys.end_of_run(job_id), keys.delayed],
            args=[
                *(CONSUMER_GROUP, job.entry_id, job.run, job.state, job.attempt),
                *(job_id, event.type, event.encode(), payload, self._job_ttl_ms),
            ],
        )
        return bool(reply == b"ended")

    async def ask_to_cancel(self, job_id: str) -> JobState | None:
        """Asks whichever consumer has, or will have, the job to cancel it; nothing happens where it has ended.

        Returns the job's state, None where it has none yet.
        """
        reply: bytes = await self._ask_to_cancel(
            keys=[self._keys.job(job_id), self._keys.cancel(job_id)], args=[CANCEL_TTL_SECONDS]
        )
        return JobState(reply.decode()) if reply else None

    async def progress(self, reader: Redis, job_id: str, after: str, block_ms: int) -> list[StreamEntry]:
        """Progress entries, and a copy of the terminal event, after an entry id (`0-0`: all)."""
        reply: Any = await reader.xread({self._keys.progress(job_id): after}, block=block_ms)
        pairs = reply.items() if isinstance(reply, dict) else reply or []
        return [StreamEntry(entry_id.decode(), fields) for _, entries in pairs for entry_id, fields in entries]

    async def dead_letters(self, after: str = "-", count: int = 1000) -> list[StreamEntry]:
        """Dead letters in order of death, beginning behind the entry id `after` (`-`: with the first)."""
        start = after if after == "-" else f"({after}"
        reply: Any = await self._redis.xrange(self._keys.dead, min=start, count=count)
        return [StreamEntry(entry_id.decode(), fields) for entry_id, fields in reply]

    async def dead_letter(self, entry_id: str) -> StreamEntry | None:
        """One dead letter by its entry id."""
        reply: Any = await self._redis.xrange(self._keys.dead, min=entry_id, max=entry_id)
        return StreamEntry(entry_id, reply[0][1]) if reply else None

    async def drop_dead_letters(self, entry_ids: Sequence[str]) -> int:
        """Removes dead letters; how many of them were there."""
        return int(await self._redis.xdel(self._keys.dead, *entry_ids)) if entry_ids else 0

    async def stats(self) -> dict[str, Any]:
        """Depths and counters, as read in one transaction, and the consumers of the last hour: which of them live."""
        keys = self._keys
        pipe = self._redis.pipeline(transaction=True)
        for stream in keys.request_streams:
            pipe.xlen(stream)
        pipe.zcard(keys.delayed)
        pipe.xlen(keys.completions)
        pipe.xlen(keys.dead)
        pipe.hgetall(keys.counters)
        pipe.zrange(keys.consumers, 0, -1, withscores=True)
        pipe.time()
        *depths, delayed, completions, dead, counters, consumers, (seconds, _) = await pipe.execute()
        live_from_ms = (seconds - LIVE_WITHIN_S) * 1000
        return {
            "waiting": dict(zip((str(priority) for priority in Priority), depths, strict=True)),
            "delayed": delayed,
            "completions": completions,
            "dead": dead,
            "counters": {name.decode(): int(value) for name, value in counters.items()},
            "consumers": [
                {**await self._consumer(name.decode(), int(seen_ms)), "live": seen_ms >= live_from_ms}
                for name, seen_ms in consumers
            ],
        }

    async def _consumer(self, name: str, seen_ms: int) -> dict[str, Any]:
        raw: dict[Any, Any] = await self._redis.hgetall(self._keys.consumer(name))
        record = {key.decode(): value.decode() for key, value in raw.items()}
        return {"name": name, "last_heartbeat_ms": seen_ms, **record}
