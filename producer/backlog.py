"""How much waits, who is alive, and how many consumers that asks for."""

import math
from typing import Any, NamedTuple

from redis.asyncio import Redis

from schemas.keys import Keys

LIVE_WITHIN_S = 60.0


class Backlog(NamedTuple):
    """`waiting`: jobs in the request streams, in progress included, and delayed ones that are due."""

    waiting: int
    live_consumers: int


async def read_backlog(redis: Redis, keys: Keys) -> Backlog:
    """Reads the backlog in one transaction.

    A job whose only consumer has died is pending in its stream: it counts, so that somebody comes for it.
    Raises redis.RedisError.
    """
    seconds, _ = await redis.time()
    pipe = redis.pipeline(transaction=True)
    for stream in keys.request_streams:
        pipe.xlen(stream)
    pipe.zcount(keys.delayed, 0, seconds * 1000)
    pipe.zcount(keys.consumers, (seconds - LIVE_WITHIN_S) * 1000, "+inf")
    reply: list[Any] = await pipe.execute()
    *waiting, live = reply
    return Backlog(sum(waiting), live)


def missing_consumers(waiting: int, in_flight: int, *, jobs_per_consumer: int, max_consumers: int) -> int:
    """How many consumers to start beside the `in_flight` ones: one for every so many jobs, at least one for any."""
    wanted = min(max_consumers, math.ceil(waiting / jobs_per_consumer))
    return max(0, wanted - in_flight)
