"""Faults 1 to 17: Redis, and the way to it."""

import hashlib

import pytest

from consumer.queue import scripts
from tests.chaos.world import World


def sha1(script: str) -> bytes:
    """What EVALSHA calls it by."""
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest().encode()


@pytest.mark.fault(1, "Redis down at start")
def test_a_consumer_that_starts_before_redis_waits_for_it(world: World) -> None:
    """Guards `until_answered(self._intake.ensure_groups)` in Worker.run."""
    world.publish("a")
    world.kill_redis()
    consumer = world.consumer()
    world.until(lambda: consumer.said("redis.out_of_reach"))
    world.start_redis()
    world.injected()
    world.until_ended()
    world.recovered()


@pytest.mark.fault(4, "finish done, reply lost")
def test_a_finish_whose_reply_is_lost_publishes_once(world: World) -> None:
    """Guards `if is_terminal(held[2]) then return 'ok'` in FINISH, and the repetition in until_answered."""
    rule = world.proxy.add(sha1(scripts.FINISH), "swallow", times=2)
    world.injected(2)
    world.publish("a", "b", "c")
    world.consumer()
    world.until_ended()
    world.recovered()
    assert rule.met == 2
