"""Faults 1 to 8: Redis is away, or the way to it is bad."""

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from consumer.queue import scripts
from producer.scripts import SUBMIT
from tests.chaos.redis_kit import (
    FIRST_NORMAL_READ,
    NEVER,
    SLOW_S,
    call_of,
    normal,
    out_of_reach_at,
    pending,
    sha1,
    until_running,
)
from tests.chaos.world import World


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


@pytest.mark.fault(2, "Redis down in the middle of a job")
def test_a_picture_outlives_a_redis_that_is_killed_under_it(world: World) -> None:
    """Guards `until_answered` in Outcomes._finish: without it the job is drawn a second time."""
    world.publish("a")
    consumer = world.consumer(CHAOS_STEP_S=SLOW_S)
    until_running(world, "a")
    world.kill_redis()
    world.until(lambda: out_of_reach_at(consumer, "finish"))
    world.start_redis()
    world.injected()
    world.until_ended()
    world.recovered()
    assert world.executions() == {"a": 1}


@pytest.mark.fault(2, "Redis down in the middle of a job")
def test_a_consumer_reads_on_from_a_redis_that_is_restarted(world: World) -> None:
    """Guards `except RedisError` in Worker._next and in the keeper's _courtesy."""
    world.publish("a", "b", "c")
    consumer = world.consumer(CHAOS_STEP_S=SLOW_S)
    until_running(world, "a")
    world.stop_redis()
    world.until(lambda: out_of_reach_at(consumer, "read") and out_of_reach_at(consumer, "announce"))
    world.start_redis()
    world.injected()
    world.until_ended()
    world.recovered()
    assert consumer.process.poll() is None


@pytest.mark.fault(3, "XADD done, reply lost")
def test_a_submission_whose_reply_is_lost_is_one_job(world: World) -> None:
    """Guards `return {same_body and 'same' …}` in SUBMIT, and the repetition in producer.queue.connect."""
    rule = world.proxy.add(call_of(SUBMIT), "swallow")
    with world.client() as client:
        world.injected()
        job = client.submit(job_id="a", prompt="a red fox")
    world.accepted.append(job.job_id)
    assert rule.met == 1
    assert job.duplicate, "the second time it was there"
    assert world.redis.xlen(normal(world)) == 1
    world.consumer()
    world.until_ended()
    world.recovered()
    assert world.executions() == {"a": 1}


@pytest.mark.fault(3, "XADD done, reply lost")
def test_a_bare_xadd_that_is_sent_twice_is_one_job(world: World) -> None:
    """Guards `if not takes_over and not owns` in BEGIN."""
    rule = world.proxy.add(b"XADD", "swallow")
    with Redis(port=world.proxy.port, retry=Retry(NoBackoff(), 1)) as redis:
        world.injected()
        redis.xadd(normal(world), {"payload": '{"job_id": "a", "prompt": "a red fox"}'})
    world.accepted.append("a")
    assert rule.met == 1
    assert world.redis.xlen(normal(world)) == 2
    world.consumer()
    world.until_ended()
    world.until(lambda: world.redis.hget(world.keys.counters, "duplicates") == b"1")
    world.recovered()
    assert world.executions() == {"a": 1}


@pytest.mark.fault(4, "finish done, reply lost")
def test_a_finish_whose_reply_is_lost_publishes_once(world: World) -> None:
    """Guards `if is_terminal(held[2]) then return 'ok'` in FINISH, and the repetition in until_answered."""
    world.redis.script_load(scripts.FINISH)  # else what is lost is only that nobody knows it
    rule = world.proxy.add(call_of(scripts.FINISH), "swallow", times=6)
    world.injected(6)
    world.publish("a")
    consumer = world.consumer()
    world.until_ended()
    world.until(lambda: rule.met == 6)
    world.recovered()
    assert world.executions() == {"a": 1}
    world.stop_consumers()
    assert not consumer.said("lease.lost"), "it has recognised its own work"
    assert not consumer.said("abandoned")


@pytest.mark.fault(5, "reset before execution")
@pytest.mark.parametrize(
    ("script", "prompt", "drawings"),
    [
        pytest.param("BEGIN", "a red fox", 1, id="begin"),
        pytest.param("START", "a red fox", 1, id="start"),
        pytest.param("FINISH", "a red fox", 1, id="finish"),
        pytest.param("RETRY", "out of memory", 2, id="retry"),
    ],
)
def test_a_step_that_is_reset_before_it_is_done_is_repeated(
    world: World, script: str, prompt: str, drawings: int
) -> None:
    """Guards `until_answered` around each step, which goes on where the Redis client gives up (after four times).
    No lease runs out that could hide its absence."""
    rule = world.proxy.add(call_of(getattr(scripts, script)), "reset", times=6)
    world.injected(6)
    world.publish("a", prompt=prompt)
    world.consumer(SDXL_LEASE_SECONDS=NEVER)
    world.until_ended()
    world.recovered()
    assert rule.met == 6
    assert world.executions() == {"a": drawings}


@pytest.mark.fault(6, "half-open connection during BLOCK")
def test_a_read_that_never_comes_back_is_given_up(world: World) -> None:
    """Guards `socket_timeout=block_s + _SOCKET_TIMEOUT_S` in connect_for_blocking_reads."""
    rule = world.proxy.add(b"BLOCK", "hang")
    world.consumer()
    world.until(lambda: rule.met)
    world.injected()
    world.publish("a", "b")
    world.until_ended()
    world.recovered()


@pytest.mark.fault(6, "half-open connection during BLOCK")
def test_an_entry_that_went_into_a_half_open_connection_is_read_again(world: World) -> None:
    """Guards `self._reread = True` in Worker._next: the lease is too long for a reclaim."""
    rule = world.proxy.add(FIRST_NORMAL_READ, "hang")
    world.publish("a")
    world.injected()
    world.consumer(SDXL_LEASE_SECONDS=NEVER)
    world.until(lambda: rule.met and pending(world) == 1)
    world.until_ended(within_s=20)
    world.recovered()
    assert world.events()[-1]["data"]["attempt"] == 1


@pytest.mark.fault(7, "latency 0.5-5 s")
def test_leases_are_kept_over_a_slow_network(world: World) -> None:
    """Guards Keeper._renew: half a second away from Redis, and another consumer is waiting for the lease to run out.
    The lease is longer than elsewhere: a connection that has to be made first costs five round trips."""
    world.publish("a")
    world.consumer(CHAOS_STEP_S="0.4", SDXL_LEASE_SECONDS="6")
    world.until(lambda: world.redis.script_exists(sha1(scripts.EXTEND))[0], within_s=10)
    world.proxy.delay_s = 0.25  # there, and back again
    world.injected()
    world.consumer(direct=True, SDXL_LEASE_SECONDS="6")
    world.until_ended()
    world.recovered()
    world.proxy.heal()
    assert world.executions() == {"a": 1}


@pytest.mark.fault(7, "latency 0.5-5 s")
def test_a_network_slower_than_the_socket_timeout_is_waited_out(world: World) -> None:
    """Guards `except RedisError` in until_answered: every command is done, and its reply comes too late.

    It takes a minute and a half to show: the client tries a command four times before it gives up, and to connect for
    it four times each.
    """
    world.publish("a")
    consumer = world.consumer(CHAOS_STEP_S=SLOW_S)
    until_running(world, "a")
    world.proxy.delay_s = 3.0
    world.publish("b")
    steps = ("begin", "note_upload", "finish")
    world.until(lambda: any(out_of_reach_at(consumer, step) for step in steps), within_s=180)
    assert consumer.said("TimeoutError")
    world.proxy.heal()
    world.injected()
    world.until_ended()
    world.recovered()
    assert world.executions()["a"] == 1


@pytest.mark.fault(8, "replies in one-byte slices")
def test_replies_may_come_byte_by_byte(world: World) -> None:
    """Guards nothing of ours: it shows that no reply is taken for whole before it is (the parser is redis-py's)."""
    world.proxy.slice_replies = True
    world.injected()
    with world.client() as client:
        for job_id in ("a", "b", "c"):
            client.submit(job_id=job_id, prompt="a red fox", metadata={"long": "x" * 2000})
            world.accepted.append(job_id)
        consumer = world.consumer()
        assert client.result("a", timeout_s=60).data.request_metadata == {"long": "x" * 2000}
    world.until_ended()
    world.recovered()
    assert not consumer.said("redis.out_of_reach")
