"""What the tests of the queue scripts share: consumers by name, requests, and a look at where a job is."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis

from consumer.queue import Begun, Delivery, Intake, Lease, Leases, Presence
from schemas.entries import decode_entry
from schemas.events import CancelledEvent, FailedEvent, RetryingEvent, StartedEvent
from schemas.keys import CONSUMER_GROUP, JobState, Keys, Priority
from schemas.requests import GenerationRequest
from tests import event_kit


def a_request(job_id: str = "job-1", **fields: Any) -> GenerationRequest:
    return GenerationRequest(job_id=job_id, prompt="a red fox", **fields)


async def publish(
    redis: Redis, keys: Keys, request: GenerationRequest, priority: Priority = Priority.NORMAL, run: int | None = None
) -> str:
    """A bare XADD, as a backend in any language does it."""
    envelope = {} if run is None else {"run": str(run)}
    return await add(redis, keys.requests(priority), {"payload": request.encode(), **envelope})


async def add(redis: Redis, stream: str, fields: Mapping[Any, str | bytes]) -> str:
    """The new entry's id."""
    entry_id: Any = await redis.xadd(stream, dict(fields))
    return str(entry_id.decode())


async def entries(redis: Redis, stream: str) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """Ids and fields, the oldest first."""
    reply: Any = await redis.xrange(stream)
    return list(reply)


def started(lease: Lease) -> StartedEvent:
    return event_kit.started(lease.job_id)


def failed(lease: Lease, **what: Any) -> FailedEvent:
    return event_kit.failed(lease.job_id, **what)


def cancelled(lease: Lease) -> CancelledEvent:
    return event_kit.cancelled(lease.job_id)


def retrying(lease: Lease) -> RetryingEvent:
    return event_kit.retrying(lease.job_id)


@dataclass
class FakeConsumer:
    """The queue's end of one consumer, without a GPU behind it."""

    redis: Redis
    keys: Keys
    name: str
    lease_s: float = 30.0
    max_attempts: int = 3
    job_ttl_s: float = 60.0
    intake: Intake = field(init=False)
    leases: Leases = field(init=False)
    presence: Presence = field(init=False)

    def __post_init__(self) -> None:
        self.intake = Intake(self.redis, self.redis, self.keys, self.name, lease_s=self.lease_s)
        self.leases = Leases(self.redis, self.keys, self.name, job_ttl_s=self.job_ttl_s)
        self.presence = Presence(self.redis, self.keys, self.name)

    async def read_one(self) -> Delivery:
        await self.intake.ensure_groups()
        [delivery] = await self.intake.read(block_ms=10)
        return delivery

    async def begin(self, delivery: Delivery, lease: Lease | None = None) -> tuple[Lease, Begun]:
        entry = decode_entry(delivery.fields)
        lease = lease or self.leases.lease(delivery, entry.job_id or "")
        expires_at = entry.request.expires_at if entry.request else None
        begun = await self.leases.begin(
            lease,
            run=entry.run,
            payload=entry.raw,
            fingerprint=entry.request.fingerprint() if entry.request else "",
            max_attempts=self.max_attempts,
            expires_at_ms=int(expires_at.timestamp() * 1000) if expires_at else None,
            valid=entry.request is not None,
        )
        return lease, begun

    async def take(self) -> tuple[Lease, Begun]:
        """Reads and begins one job."""
        return await self.begin(await self.read_one())

    async def fail(self, lease: Lease, **what: Any) -> str:
        event = failed(lease, **what)
        return await self.leases.finish(lease, JobState.FAILED, event, b"{}", dead=event.data.dead_lettered)


async def let_lease_run_out(redis: Redis, keys: Keys, delivery: Delivery, owner: str) -> None:
    """Ages an entry in its owner's hands by an hour, instead of waiting for it."""
    await redis.xclaim(delivery.stream, CONSUMER_GROUP, owner, 0, [delivery.entry_id], idle=3_600_000, justid=True)


async def job(redis: Redis, keys: Keys, job_id: str = "job-1") -> dict[str, str]:
    raw: Any = await redis.hgetall(keys.job(job_id))
    return {name.decode(): value.decode() for name, value in raw.items()}


async def completions(redis: Redis, keys: Keys) -> list[dict[str, Any]]:
    return [json.loads(fields[b"payload"]) for _, fields in await entries(redis, keys.completions)]


async def where_is(redis: Redis, keys: Keys, job_id: str = "job-1") -> list[str]:
    """The places that a job is in: stream, pending, delayed, done. There must be exactly one."""
    places = []
    for stream in keys.request_streams:
        found = await entries(redis, stream)
        for entry_id in [entry_id for entry_id, fields in found if decode_entry(fields).job_id == job_id]:
            pending = await redis.xpending_range(stream, CONSUMER_GROUP, entry_id, entry_id, 1)
            places.append("pending" if pending else "stream")
    if await redis.zscore(keys.delayed, job_id) is not None:
        places.append("delayed")
    if (await job(redis, keys, job_id)).get("state") in ("succeeded", "failed", "cancelled"):
        places.append("done")
    return places
