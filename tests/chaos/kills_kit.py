"""Deaths that are measured: a second consumer is up already, and takes nothing until the first one is dead."""

import signal
from typing import Any

import psutil

from schemas.keys import CONSUMER_GROUP, Priority
from tests.chaos.world import Consumer, World


def survivor(world: World, **environment: Any) -> Consumer:
    """A consumer that is up and frozen: see `freeze`."""
    consumer = world.consumer(**environment)
    world.until(lambda: str(consumer.process.pid).encode() in b" ".join(pids(world)))
    freeze(world, consumer)
    return consumer


def pids(world: World) -> list[bytes]:
    """Of the consumers that have said that they live."""
    names: Any = world.redis.zrange(world.keys.consumers, 0, -1)
    found: Any = [world.redis.hget(world.keys.consumer(name.decode()), "pid") for name in names]
    return [pid for pid in found if pid]


def freeze(world: World, consumer: Consumer) -> None:
    """Stops a consumer that holds nothing, and waits until Redis gives it nothing more either."""
    consumer.signal(signal.SIGSTOP)
    world.until(lambda: is_frozen(consumer) and not any("b" in one["flags"] for one in world.redis.client_list()))


def is_frozen(consumer: Consumer) -> bool:
    return bool(psutil.Process(consumer.process.pid).status() == psutil.STATUS_STOPPED)


def events_of(world: World, job_id: str) -> list[str]:
    """`started`, `retrying:1` and so on, in the order of their publication."""
    return [event["id"].split(":", 2)[2] for event in world.events() if event["data"]["job_id"] == job_id]


def has_started(world: World, job_id: str) -> bool:
    return any(name.startswith("started") for name in events_of(world, job_id))


def idles_s(world: World, priority: Priority = Priority.NORMAL) -> list[float]:
    """For how long the owner of each pending entry has been silent."""
    pending: Any = world.redis.xpending_range(world.keys.requests(priority), CONSUMER_GROUP, "-", "+", 100)
    return [entry["time_since_delivered"] / 1000 for entry in pending]


def job(world: World, job_id: str) -> dict[str, str]:
    """Its hash."""
    reply: Any = world.redis.hgetall(world.keys.job(job_id))
    return {name.decode(): value.decode() for name, value in reply.items()}


def thaw_and_measure(world: World, consumer: Consumer, *job_ids: str) -> dict[str, dict[str, Any]]:
    """The fault has been injected: the survivor goes on, and ends these jobs, all accepted ones if none is named."""
    world.injected()
    consumer.signal(signal.SIGCONT)
    ended = world.until_ended(*job_ids)
    world.recovered()
    return ended
