"""How much waits, for how long, who is alive, and how many consumers that asks for."""

import math
from typing import Any, NamedTuple

from redis.asyncio import Redis

from producer.stream_ids import stream_time
from schemas.keys import Keys

LIVE_WITHIN_S = 60.0


class Backlog(NamedTuple):
    """`waiting`: jobs in the request streams, in progress included, and delayed ones that are due.

    `oldest_waiting_s`: how long the oldest of these has been there, or due; 0 where there is none.
    """

    waiting: int
    live_consumers: int
    oldest_waiting_s: float


async def read_backlog(redis: Redis, keys: Keys) -> Backlog:
    """Reads the backlog in one transaction.

    A job whose only consumer has died is pending in its stream: it counts, so that somebody comes for it.
    Raises redis.RedisError.
    """
    seconds, microseconds = await redis.time()
    now_s = seconds + microseconds / 1e6
    pipe = redis.pipeline(transaction=True)
    for stream in keys.request_streams:
        pipe.xlen(stream)
    pipe.zcount(keys.delayed, 0, seconds * 1000)
    for stream in keys.request_streams:
        pipe.xrange(stream, count=1)
    pipe.zrange(keys.delayed, 0, 0, withscores=True)
    pipe.zcount(keys.consumers, (seconds - LIVE_WITHIN_S) * 1000, "+inf")
    reply: list[Any] = await pipe.execute()
    streams = len(keys.request_streams)
    waiting, oldest, delayed, live = reply[: streams + 1], reply[streams + 1 : -2], reply[-2], reply[-1]
    since_s = [stream_time(entry_id.decode()).timestamp() for entries in oldest for entry_id, _ in entries]
    since_s += [due_ms / 1000 for _, due_ms in delayed]
    return Backlog(sum(waiting), live, max(0.0, now_s - min(since_s, default=now_s)))


def missing_consumers(waiting: int, in_flight: int, *, jobs_per_consumer: int, max_consumers: int) -> int:
    """How many consumers to start beside the `in_flight` ones: one for every so many jobs, at least one for any."""
    wanted = min(max_consumers, math.ceil(waiting / jobs_per_consumer))
    return max(0, wanted - in_flight)
