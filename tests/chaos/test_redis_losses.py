"""Faults 9, 10, 12 and 17: Redis has forgotten something that it knew."""

import signal
from typing import Any

import pytest

from consumer.queue import scripts
from schemas.keys import CONSUMER_GROUP
from tests.chaos.redis_kit import (
    FIRST_NORMAL_READ,
    NEVER,
    SLOW_S,
    call_of,
    copy_aof,
    normal,
    pending,
    until_running,
)
from tests.chaos.world import BUCKET, World


@pytest.mark.fault(9, "FLUSHALL / NOGROUP", forgot=True)
def test_consumers_go_on_after_a_flush(world: World) -> None:
    """Guards `_expect_missing_group` in Intake._read_group, and the fence: nobody hears of a forgotten job."""
    world.publish("a", "b")
    consumer = world.consumer(CHAOS_STEP_S=SLOW_S)
    until_running(world, "a")
    world.redis.flushall()
    world.forget("a", "b")
    world.injected()
    world.publish("c", "d")
    world.until_ended()
    world.recovered()
    assert consumer.said("queue.group_missing")
    assert world.ended().keys() == {"c", "d"}


@pytest.mark.fault(9, "FLUSHALL / NOGROUP")
def test_a_job_in_hand_is_not_begun_again_when_its_group_is_made_anew(world: World) -> None:
    """Guards `not in self._keeper.leases_held` in Worker._next: the new group delivers the entry to its owner again."""
    world.publish("a")
    consumer = world.consumer(CHAOS_STEP_S="0.15")
    until_running(world, "a")
    world.redis.xgroup_destroy(normal(world), CONSUMER_GROUP)
    world.injected()
    world.publish("b")
    world.until_ended()
    world.recovered()
    assert consumer.said("queue.group_missing")
    assert world.executions() == {"a": 1, "b": 1}


@pytest.mark.fault(9, "FLUSHALL / NOGROUP")
def test_a_group_that_is_destroyed_under_a_full_queue_loses_none(world: World) -> None:
    """Guards `id="0"` in Intake.ensure_groups. With its hands full the consumer reads nothing, so that what it ends has
    no group yet, and is drawn again."""
    world.publish("a", "b", "c", "d")
    consumer = world.consumer(CHAOS_STEP_S=SLOW_S)
    until_running(world, "a")
    world.redis.xgroup_destroy(normal(world), CONSUMER_GROUP)
    world.injected()
    world.until_ended(within_s=20)
    world.recovered()
    assert consumer.said("queue.group_missing")


@pytest.mark.fault(10, "trim under pending entries", forgot=True)
def test_entries_trimmed_under_their_owners_vanish(world: World) -> None:
    """Guards `XACK` in RECLAIM: Redis 6.2 keeps what was trimmed pending, for ever."""
    world.publish("held")
    world.consumer(CHAOS_STEP_S="0.2", SDXL_PREFETCH="0")
    until_running(world, "held")
    world.publish("dead")
    assert world.consumer(failpoints="begin.after=kill").wait() == -signal.SIGKILL
    world.publish("waiting")
    world.redis.xtrim(normal(world), maxlen=0, approximate=False)
    world.forget("dead", "waiting")
    world.injected()
    world.publish("new")
    world.until_ended()
    world.until(lambda: pending(world) == 0, within_s=15)
    world.recovered()
    assert world.ended().keys() == {"held", "new"}
    assert world.executions()["held"] == 1


@pytest.mark.fault(10, "trim under pending entries", forgot=True)
def test_an_entry_deleted_on_its_lost_way_to_a_consumer_vanishes(world: World) -> None:
    """Guards `xack` in Intake._deliveries: the lease is too long for a reclaim."""
    rule = world.proxy.add(FIRST_NORMAL_READ, "hang")
    world.publish("a")
    world.consumer(SDXL_LEASE_SECONDS=NEVER)
    world.until(lambda: rule.met and pending(world) == 1)
    entries: Any = world.redis.xrange(normal(world))
    assert world.redis.xdel(normal(world), *[entry_id for entry_id, _ in entries]) == 1
    world.forget("a")
    world.injected()
    world.publish("new")
    world.until_ended()
    world.until(lambda: pending(world) == 0, within_s=15)
    world.recovered()


@pytest.mark.fault(12, "failover loses the last N writes", forgot=True)
def test_a_redis_that_wakes_up_in_the_past_is_served_again(world: World) -> None:
    """Guards `found.run == stamp.run` in ArtifactStore._upload: the picture is there, from the time that was lost."""
    world.publish("done")
    world.consumer(CHAOS_STEP_S=SLOW_S)
    world.until_ended()
    world.publish("running", "queued", "third")
    until_running(world, "running")
    copy_aof(world.folder, world.folder / "past")
    world.publish("unknown")
    world.until_ended()
    picture = world.store.objects[f"/{BUCKET}/images/running.png"]
    world.kill_redis()
    copy_aof(world.folder / "past", world.folder)
    world.start_redis()
    assert world.ended().keys() == {"done"}
    world.forget("unknown")
    world.injected()
    world.publish("new")
    world.until_ended()
    world.recovered()
    assert world.executions() == {"done": 1, "running": 2, "queued": 2, "third": 2, "unknown": 1, "new": 1}
    assert world.store.objects[f"/{BUCKET}/images/running.png"] is picture


@pytest.mark.fault(17, "NOSCRIPT")
def test_scripts_are_loaded_again_after_a_flush(world: World) -> None:
    """Guards `register_script` in Leases and Intake, which loads what Redis does not know."""
    world.publish("a", "b")
    world.consumer(CHAOS_STEP_S=SLOW_S)
    until_running(world, "a")
    world.redis.script_flush()
    world.injected()
    world.until_ended()
    world.recovered()
    assert world.executions() == {"a": 1, "b": 1}


@pytest.mark.fault(17, "NOSCRIPT")
def test_scripts_may_be_flushed_between_loading_and_calling(world: World) -> None:
    """Guards `NoScriptError` in consumer.outage: a finish that is given up would cost a second drawing."""
    unknown = b"-NOSCRIPT No matching script. Please use EVAL.\r\n"
    rule = world.proxy.add(call_of(scripts.FINISH), "answer", times=5, reply=unknown)
    world.injected(5)
    world.publish("a")
    world.consumer()
    world.until_ended()
    world.recovered()
    assert rule.met == 5
    assert world.executions() == {"a": 1}
