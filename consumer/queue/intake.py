"""Getting entries: new ones, those that dead consumers left, and delayed jobs that are due."""

import math
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import structlog
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from consumer import failpoints
from consumer.queue import scripts
from consumer.queue.connection import server_time_ms
from schemas.keys import CONSUMER_GROUP, IDLE_NAME_MS, Keys, Priority
from schemas.lua import FORGET_IDLE_NAMES

Place = tuple[str, str]

log = structlog.get_logger(__name__)


class Delivery(NamedTuple):
    """One stream entry that this consumer was given."""

    stream: str
    entry_id: str
    fields: Mapping[bytes, bytes]

    @property
    def place(self) -> Place:
        """What names the entry: an id is unique in its stream alone."""
        return self.stream, self.entry_id


class Intake:
    """Reads, reclaims and promotes for one consumer name. Every method may raise redis.RedisError."""

    def __init__(self, redis: Redis, reader: Redis, keys: Keys, name: str, *, lease_s: float) -> None:
        self._redis = redis
        self._reader = reader
        self._keys = keys
        self._name = name
        self._lease_ms = math.ceil(lease_s * 1000)
        self._turn = 0
        self._cursors = dict.fromkeys(keys.request_streams, "0-0")
        self._promote = redis.register_script(scripts.PROMOTE)
        self._reclaim = redis.register_script(scripts.RECLAIM)
        self._forget_idle_names = redis.register_script(FORGET_IDLE_NAMES)

    async def ensure_groups(self) -> None:
        """Creates the consumer group on every request stream, from its first entry on.

        Names in it that hold nothing and have been silent for an hour are removed: killed consumers leave them.
        """
        for stream in self._keys.request_streams:
            try:
                await self._redis.xgroup_create(stream, CONSUMER_GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise
            await self._forget_idle_names(keys=[stream], args=[CONSUMER_GROUP, IDLE_NAME_MS])

    async def read(self, *, block_ms: int) -> list[Delivery]:
        """The next entry, most urgent stream first with a share for each; with all of them empty, waits `block_ms`.

        One entry, but up to one per stream when they arrive at the same instant. Of 16 entries the normal stream is
        asked first for 3 and the low one for 1, so none starves.
        """
        for stream in self._order():
            with failpoints.around("read"):
                found = await self._read_group({stream: ">"}, count=1)
            if found:
                self._turn += 1
                return found
        return await self._read_group(dict.fromkeys(self._keys.request_streams, ">"), count=1, block_ms=block_ms)

    async def unseen(self, held: Collection[Place]) -> list[Delivery]:
        """Entries pending under our name that are not `held`: their delivery was lost on its way to us."""
        pending = await self._read_group(dict.fromkeys(self._keys.request_streams, "0"), count=100)
        return [delivery for delivery in pending if delivery.place not in held]

    async def reclaim(self, held: Collection[Place]) -> list[Delivery]:
        """At most one entry whose owner has let its lease run out, or has handed it back. It takes a turn."""
        for stream in self._order():
            args: list[Any] = [CONSUMER_GROUP, self._name, self._lease_ms, self._cursors[stream]]
            try:
                with failpoints.around("reclaim"):
                    cursor, *claimed = await self._reclaim(keys=[stream], args=args)
            except ResponseError as error:
                await self._expect_missing_group(error)
                continue
            self._cursors[stream] = cursor.decode()
            if claimed and (stream, claimed[0].decode()) not in held:
                entry_id, pairs = claimed
                self._turn += 1
                return [Delivery(stream, entry_id.decode(), dict(zip(pairs[::2], pairs[1::2], strict=True)))]
        return []

    async def promote(self, limit: int = 100) -> int:
        """Moves delayed jobs that are due back to their streams; returns how many."""
        now_ms = server_time_ms(await self._redis.time())
        due: Any = await self._redis.zrangebyscore(self._keys.delayed, 0, now_ms, start=0, num=limit)
        moved = 0
        for job_id in (raw.decode() for raw in due):
            priority: Any = await self._redis.hget(self._keys.job(job_id), "priority")
            stream = self._keys.requests(Priority(priority.decode()) if priority else Priority.NORMAL)
            keys = [self._keys.delayed, self._keys.job(job_id), self._keys.cancel(job_id), stream]
            with failpoints.around("promote"):
                moved += int(await self._promote(keys=keys, args=[job_id]))
        return moved

    def _order(self) -> list[str]:
        high, normal, low = self._keys.request_streams
        if self._turn % 16 == 15:
            return [low, high, normal]
        return [normal, high, low] if self._turn % 4 == 3 else [high, normal, low]

    async def _read_group(self, streams: dict[str, str], *, count: int, block_ms: int | None = None) -> list[Delivery]:
        ask = partial(
            self._reader.xreadgroup, CONSUMER_GROUP, self._name, dict(streams.items()), count=count, block=block_ms
        )
        try:
            reply: Any = await ask()
        except ResponseError as error:
            await self._expect_missing_group(error)
            reply = await ask()  # it may have been missing for one stream of several
        found: list[Delivery] = []
        for stream, entries in reply.items() if isinstance(reply, dict) else reply or []:
            found += await self._deliveries(stream.decode(), entries)
        return found

    async def _expect_missing_group(self, error: ResponseError) -> None:
        """A flush or a failover took the group: what the streams hold now is delivered from the first entry on."""
        if "NOGROUP" not in str(error):
            raise error
        log.warning("queue.group_missing", group=CONSUMER_GROUP)
        await self.ensure_groups()

    async def _deliveries(self, stream: str, entries: Iterable[Any]) -> list[Delivery]:
        found = []
        for entry_id, fields in entries:
            if fields:
                found.append(Delivery(stream, entry_id.decode(), fields))
            else:  # deleted, and still pending: Redis 6.2 keeps those
                await self._redis.xack(stream, CONSUMER_GROUP, entry_id)
        return found
