"""Who waits for a job, across all gateways of a queue: the last one to leave a synchronous call's job cancels it."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from producer.cancelling import cancellation
from producer.gateway.tasks import Background, stop
from producer.queue import ProducerQueue
from schemas.keys import CANCEL_TTL_SECONDS, JobState, Keys
from schemas.lua import CLOCK, IS_TERMINAL

HOLD_S = 30.0
_LEAVE_WITHIN_S = 1.0

T = TypeVar("T")

log = structlog.get_logger(__name__)

# Notes, or goes on noting, that somebody waits. All hold for equally long, so the latest one's end is the key's.
_JOIN = (
    CLOCK
    + """
local waiters, member, hold_ms = KEYS[1], ARGV[1], tonumber(ARGV[2])
local now = now_ms()
redis.call('ZREMRANGEBYSCORE', waiters, '-inf', now)
redis.call('ZADD', waiters, now + hold_ms, member)
redis.call('PEXPIRE', waiters, hold_ms)
"""
)

# Answers the run that nobody waits for any more, having asked to cancel it; 0 where somebody does, where no synchronous
# call has made it, or where it has ended.
_LEAVE = (
    CLOCK
    + IS_TERMINAL
    + """
local waiters, job, cancel, member, cancel_ttl_s = KEYS[1], KEYS[2], KEYS[3], ARGV[1], ARGV[2]
redis.call('ZREM', waiters, member)
redis.call('ZREMRANGEBYSCORE', waiters, '-inf', now_ms())
if redis.call('EXISTS', waiters) == 1 then return 0 end
local values = redis.call('HMGET', job, 'run', 'state', 'caller')
if not values[3] or is_terminal(values[2]) then return 0 end
redis.call('HSET', job, 'caller', 'left')
redis.call('SET', cancel, 1, 'EX', cancel_ttl_s)
return tonumber(values[1])
"""
)


class Stay:
    """One wait for a job. What is sent for it is seen through: it must not reach Redis after the leaving."""

    def __init__(self, background: Background) -> None:
        self._background = background
        self._sent: asyncio.Task[Any] | None = None

    async def send(self, step: Coroutine[Any, Any, T]) -> T:
        """Awaits the step, which goes on where whoever awaits it is cancelled."""
        self._sent = task = self._background.start(step)
        return await asyncio.shield(task)

    async def settled(self) -> None:
        """Waits for a step that is under way, whatever comes of it."""
        if self._sent is not None:
            await asyncio.wait({self._sent})


class Waiters:
    """Every waiter is noted for `hold_s` seconds at a time: what a gateway that was killed has noted soon lapses.

    Every method may raise redis.RedisError.
    """

    def __init__(
        self, redis: Redis, keys: Keys, queue: ProducerQueue, background: Background, *, hold_s: float = HOLD_S
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._queue = queue
        self._background = background
        self._hold_s = hold_s
        self._join = redis.register_script(_JOIN)
        self._leave = redis.register_script(_LEAVE)

    @asynccontextmanager
    async def waiting(self, job_id: str) -> AsyncIterator[Stay]:
        """Waits for the job, which need not be there yet, until the block ends and what it has sent is through."""
        member, stay = uuid.uuid4().hex, Stay(self._background)
        renewing = asyncio.create_task(self._go_on_noting(job_id, member))
        try:
            await stay.send(self._note(job_id, member))
            yield stay
        finally:
            # a task, since whoever waited may be cancelled again, and a caller is not kept waiting by an outage
            leaving = self._background.start(self._go(job_id, member, stay, renewing))
            await asyncio.wait({leaving}, timeout=_LEAVE_WITHIN_S)

    async def has_been_left(self, job_id: str, run: int) -> bool:
        """Whether this run was cancelled because nobody waited for it."""
        held = await self._redis.hmget(self._keys.job(job_id), ["run", "caller"])
        return held == [str(run).encode(), b"left"]

    async def _note(self, job_id: str, member: str) -> None:
        await self._join(keys=[self._keys.waiters(job_id)], args=[member, round(self._hold_s * 1000)])

    async def _go_on_noting(self, job_id: str, member: str) -> None:
        while True:
            await asyncio.sleep(self._hold_s / 3)
            try:
                await self._note(job_id, member)
            except RedisError:
                continue  # whoever waits tells of it

    async def _go(self, job_id: str, member: str, stay: Stay, renewing: asyncio.Task[None]) -> None:
        keys = self._keys
        await stay.settled()
        await stop(renewing)
        try:
            run = int(
                await self._leave(
                    keys=[keys.waiters(job_id), keys.job(job_id), keys.cancel(job_id)],
                    args=[member, CANCEL_TTL_SECONDS],
                )
            )
            if run:
                await self._end_waiting(job_id, run)
        except RedisError as error:
            log.warning("waiter_not_removed", job_id=job_id, error=type(error).__name__)

    async def _end_waiting(self, job_id: str, run: int) -> None:
        """Ends the run at once where it still waits; a consumer that has it was asked to."""
        record = await self._queue.job(job_id)
        if record is not None and record.run == run and record.state in (JobState.QUEUED, JobState.DELAYED):
            await self._queue.cancel_waiting(record, *cancellation(record, datetime.now(UTC)))
