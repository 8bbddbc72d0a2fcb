"""Consumers whose GPU fails them, as processes: they end with a failure, so that the platform replaces them."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.world import World, a_world


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with a_world(tmp_path) as world:
        yield world


def test_a_consumer_whose_gpu_hangs_ends_its_process_though_the_thread_never_ends(world: World) -> None:
    """Guards `os._exit` in `consumer.__main__.main`: Python waits for its threads."""
    world.publish("a", "b")
    consumer = world.consumer(failpoints="generate.before=hang", SDXL_STALL_SECONDS="0.3", SDXL_DRAIN_SECONDS="1")
    assert consumer.wait() == 1
    assert consumer.said("consumer.broken")
    [record] = [world.redis.hgetall(key) for key in world.redis.scan_iter("*:consumers:*")]
    assert record[b"state"] == b"failed"
    world.consumer()
    ended = world.until_ended()
    assert sorted(event["data"]["attempt"] for event in ended.values()) == [1, 2]


def test_a_consumer_that_only_fails_ends_its_process_and_keeps_nothing(world: World) -> None:
    """Guards the exit status in `consumer.__main__.consume`."""
    world.publish(*"abcde", prompt="out of memory")
    consumer = world.consumer(SDXL_RETRY_BASE_SECONDS="30", SDXL_RETRY_CAP_SECONDS="30")
    assert consumer.wait() == 1
    assert sum(world.executions().values()) <= 4  # one more may have had the GPU when the third one failed
    pending = world.redis.xpending(world.keys.request_streams[1], "consumers")["consumers"]
    assert [one["name"] for one in pending if one["name"] != b"released"] == []


def test_a_consumer_that_was_frozen_for_longer_than_a_stall_goes_on(world: World) -> None:
    """Guards that `Stages._comes_on` counts its looks: by the clock, the time in which nothing ran would be a stall."""
    world.publish("a", steps=20)
    consumer = world.consumer(CHAOS_STEP_S="0.1", SDXL_STALL_SECONDS="0.7", SDXL_LEASE_SECONDS="30")
    world.until(lambda: world.executions()["a"])
    consumer.signal(signal.SIGSTOP)
    time.sleep(1.1)  # not a wait for something: the freeze itself
    consumer.signal(signal.SIGCONT)
    ended = world.until_ended()
    assert (ended["a"]["type"], ended["a"]["data"]["attempt"]) == ("generation.succeeded", 1)
