"""Who is alive, for people and for whoever starts consumers."""

from collections.abc import Mapping

from redis.asyncio import Redis

from consumer.queue import scripts
from consumer.queue.connection import server_time_ms
from schemas import lua
from schemas.keys import CONSUMER_GROUP, Keys

_RECORD_TTL_MS = 3_600_000


class Presence:
    """One consumer's entry among the living."""

    def __init__(self, redis: Redis, keys: Keys, name: str) -> None:
        self._redis = redis
        self._keys = keys
        self._name = name
        self._leave = redis.register_script(scripts.LEAVE)
        self._trim = redis.register_script(lua.TRIM_COMPLETIONS)

    async def heartbeat(self, record: Mapping[str, str]) -> None:
        """Says that this consumer lives, and what it does.

        Forgets the consumers that have been silent for an hour, and the events that every group has acknowledged: a
        backend of another language may have nobody else who does.
        """
        now_ms = server_time_ms(await self._redis.time())
        pipe = self._redis.pipeline(transaction=True)
        pipe.zadd(self._keys.consumers, {self._name: now_ms})
        pipe.zremrangebyscore(self._keys.consumers, 0, now_ms - _RECORD_TTL_MS)
        pipe.hset(self._keys.consumer(self._name), mapping=dict(record.items()))
        pipe.pexpire(self._keys.consumer(self._name), _RECORD_TTL_MS)
        await pipe.execute()
        await self._trim(keys=[self._keys.completions])

    async def leave(self) -> None:
        """Removes this consumer from the living, and from the groups in which it holds nothing."""
        for stream in self._keys.request_streams:
            await self._leave(keys=[stream], args=[CONSUMER_GROUP, self._name])
        await self._redis.zrem(self._keys.consumers, self._name)
        await self._redis.delete(self._keys.consumer(self._name))
