"""How `python -m consumer` comes to its end, as a process."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.servers import RedisServer, S3Server
from schemas.keys import Keys
from tests.chaos.world import World, a_world
from tests.integration.wire_kit import BUCKET, consuming


@pytest.fixture
def s3(s3_at: S3Server) -> S3Server:
    s3_at.create_bucket(BUCKET)
    return s3_at


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Consumers that draw without a model."""
    with a_world(tmp_path) as world:
        yield world


def running(world: World) -> bool:
    return any(event["type"] == "generation.started" for event in world.events())


def test_a_terminated_consumer_ends_its_job_hands_back_the_rest_and_exits_with_0(world: World) -> None:
    consumer = world.consumer(CHAOS_STEP_S="0.1", SDXL_LEASE_SECONDS="600")
    world.publish("running")
    world.until(lambda: running(world))
    world.publish("prepared", "waiting")
    consumer.signal(signal.SIGTERM)
    assert consumer.wait() == 0
    assert [event["type"] for event in world.events()] == ["generation.started", "generation.succeeded"]
    assert world.redis.hget(world.keys.job("prepared"), "attempt") in (b"0", None)
    assert world.redis.zcard(world.keys.consumers) == 0
    world.consumer(SDXL_LEASE_SECONDS="600")  # at once: what is handed back waits for nobody's lease
    ended = world.until_ended("prepared", "waiting")
    assert [event["data"]["attempt"] for event in ended.values()] == [1, 1, 1]


def test_a_consumer_terminated_twice_hands_its_running_job_back_uncounted(world: World) -> None:
    consumer = world.consumer(CHAOS_STEP_S="1.0", SDXL_DRAIN_SECONDS="60")
    world.publish("running")
    world.until(lambda: running(world))
    consumer.signal(signal.SIGTERM)
    world.until(lambda: consumer.said("consumer.draining"))
    consumer.signal(signal.SIGTERM)
    assert consumer.wait() == 0
    assert world.redis.hmget(world.keys.job("running"), "state", "attempt") == [b"queued", b"0"]


def test_a_killed_consumers_job_is_done_by_the_next_one(world: World) -> None:
    consumer = world.consumer(CHAOS_STEP_S="1.0", SDXL_LEASE_SECONDS="1")
    world.publish("orphan")
    world.until(lambda: running(world))
    consumer.kill()
    idle = world.consumer(SDXL_LEASE_SECONDS="1", SDXL_IDLE_EXIT_SECONDS="1")
    event = world.until_ended()["orphan"]
    assert (event["type"], event["data"]["attempt"]) == ("generation.succeeded", 2)
    assert idle.wait() == 0  # idle


def test_a_consumer_that_cannot_load_its_model_says_so_and_pulls_nothing(
    redis_at: RedisServer, s3: S3Server, tmp_path: Path, keys: Keys
) -> None:
    with consuming(redis_at, s3, tmp_path / "no-model", tmp_path, keys, SDXL_SPEED="fast") as wire:
        wire.add("untouched")
        assert wire.process.wait(60) == 1
        assert b"model.broken" in wire.log.read_bytes()
        names: Any = wire.redis.zrange(wire.keys.consumers, 0, -1)
        [name] = names
        record = wire.redis.hgetall(wire.keys.consumer(name.decode()))
        assert (record[b"state"], record[b"error_code"]) == (b"failed", b"MODEL_LOAD_FAILED")
        assert wire.redis.xlen(wire.keys.request_streams[1]) == 1
        assert not wire.redis.xinfo_groups(wire.keys.request_streams[1])


def test_a_consumer_terminated_while_it_loads_exits_with_0(
    redis_at: RedisServer, s3: S3Server, tiny_model: Path, tmp_path: Path, keys: Keys
) -> None:
    with consuming(redis_at, s3, tiny_model, tmp_path, keys) as wire:
        wire.until(lambda: b"consumer.loading" in wire.log.read_bytes())
        assert b"model.loaded" not in wire.log.read_bytes()
        assert wire.stop() == 0


def test_a_wrong_setting_is_named_without_its_value(
    redis_at: RedisServer, s3: S3Server, tiny_model: Path, tmp_path: Path, keys: Keys
) -> None:
    with consuming(redis_at, s3, tiny_model, tmp_path, keys, SDXL_LEASE_SECONDS="s3cret") as wire:
        assert wire.process.wait(60) == 2
        log = wire.log.read_text()
        assert "SDXL_LEASE_SECONDS" in log
        assert "s3cret" not in log
