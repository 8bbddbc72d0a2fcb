"""Faults 11 and 13 to 16: Redis is there and refuses."""

import signal

import pytest
from redis.exceptions import ResponseError

from tests.chaos.redis_kit import SLOW_S, normal, out_of_reach_at, until_running
from tests.chaos.world import World

_NOBODY = 1  # a port where nothing listens


@pytest.mark.fault(11, "READONLY")
def test_a_redis_that_became_a_replica_is_waited_for(world: World) -> None:
    """Guards `READONLY` in _PASSING_TEXTS of consumer.outage: a finish given up would cost a second drawing."""
    world.publish("a", "b")
    consumer = world.consumer(CHAOS_STEP_S=SLOW_S, SDXL_PREFETCH="0")
    until_running(world, "a")
    world.redis.replicaof("127.0.0.1", _NOBODY)
    world.until(lambda: out_of_reach_at(consumer, "finish"))
    world.redis.replicaof("NO", "ONE")
    world.injected()
    world.until_ended()
    world.recovered()
    assert world.executions() == {"a": 1, "b": 1}


@pytest.mark.fault(13, "OOM on XADD")
def test_a_full_redis_refuses_new_jobs_and_lets_those_end_that_it_has(world: World) -> None:
    """Guards the order of writes: `remove` before `end_run` in FINISH, `XADD` before `DEL` in the producer's _ENQUEUE,
    which would otherwise take what cannot be worked on."""
    world.publish("a", "b")
    world.consumer(CHAOS_STEP_S=SLOW_S)
    until_running(world, "a")
    with world.client() as client:
        world.redis.config_set("maxmemory", 1)
        with pytest.raises(ResponseError, match="OOM"):
            client.submit(job_id="c", prompt="a red fox")
        assert world.redis.exists(world.keys.job("c")) == 0
        world.until_ended(within_s=20)
        assert world.redis.xlen(normal(world)) == 0
        world.redis.config_set("maxmemory", 0)
        world.injected()
        client.submit(job_id="c", prompt="a red fox")
    world.accepted.append("c")
    world.until_ended()
    world.recovered()
    assert world.executions() == {"a": 1, "b": 1, "c": 1}


@pytest.mark.fault(14, "NOPERM")
@pytest.mark.parametrize(
    ("command", "step"),
    [
        pytest.param("xack", "finish", id="within-a-script"),
        pytest.param("evalsha", "finish", id="of-a-script"),
        pytest.param("xreadgroup", "read", id="of-a-read"),
    ],
)
def test_a_command_that_is_forbidden_for_a_while_is_repeated(world: World, command: str, step: str) -> None:
    """Guards `The user executing the script can't` (the first) and NoPermissionError (the second) in consumer.outage,
    and `except RedisError` in Worker._next (the third)."""
    world.publish("a")
    consumer = world.consumer(CHAOS_STEP_S=SLOW_S)
    until_running(world, "a")
    world.redis.acl_setuser("default", enabled=True, commands=[f"-{command}"])
    world.publish("b")
    world.until(lambda: out_of_reach_at(consumer, step))
    world.redis.acl_setuser("default", enabled=True, categories=["+@all"])
    world.injected()
    world.until_ended()
    world.recovered()
    assert world.executions() == {"a": 1, "b": 1}


@pytest.mark.fault(15, "password rotated")
def test_jobs_outlive_a_change_of_the_password(world: World) -> None:
    """Guards `except RedisError` in Worker._next and until_answered: the consumer with the old password neither dies
    nor gives up until it is replaced. That nothing logs a password is shown, of the text of every log."""
    old, new = "the-old-password", "the-new-password"

    def url(password: str) -> str:
        return f"redis://:{password}@127.0.0.1:{world.proxy.port}/0"

    world.redis.config_set("requirepass", old)
    world.publish("a", "b")
    first = world.consumer(REDIS_URL=url(old), CHAOS_STEP_S=SLOW_S, SDXL_DRAIN_SECONDS="0.1")
    until_running(world, "a")
    world.redis.config_set("requirepass", new)
    world.redis.client_kill_filter(_type="normal", skipme=True)
    world.until(lambda: out_of_reach_at(first, "read") or out_of_reach_at(first, "finish"))
    world.publish("c")
    assert first.process.poll() is None
    first.signal(signal.SIGTERM)
    assert first.wait() == 0
    world.injected()
    second = world.consumer(REDIS_URL=url(new))
    world.until_ended()
    world.recovered()
    assert not any(one.said(password) for one in (first, second) for password in (old, new))


@pytest.mark.fault(16, "LOADING")
def test_a_redis_that_is_loading_is_waited_for(world: World) -> None:
    """Guards `not isinstance(error, ResponseError)` in outage.is_passing: redis-py calls it a lost connection."""
    world.publish("a")
    consumer = world.consumer(CHAOS_STEP_S=SLOW_S)
    until_running(world, "a")
    loading = b"-LOADING Redis is loading the dataset in memory\r\n"
    rule = world.proxy.add(b"", "answer", times=1_000_000, reply=loading)
    world.publish("b")
    world.until(lambda: out_of_reach_at(consumer, "finish") and consumer.said("BusyLoadingError"))
    world.proxy.rules.remove(rule)
    world.injected()
    world.until_ended()
    world.recovered()
    assert world.executions() == {"a": 1, "b": 1}
