"""How `python -m consumer` comes to its end, as a process."""

import signal
from pathlib import Path
from typing import Any

import pytest

from demo.servers import RedisServer, S3Server
from schemas.keys import Keys
from tests.integration.wire_kit import BUCKET, consuming


@pytest.fixture
def s3(s3_at: S3Server) -> S3Server:
    s3_at.create_bucket(BUCKET)
    return s3_at


def test_a_terminated_consumer_ends_its_job_hands_back_the_rest_and_exits_with_0(
    redis_at: RedisServer, s3: S3Server, tiny_model: Path, tmp_path: Path, keys: Keys
) -> None:
    with consuming(redis_at, s3, tiny_model, tmp_path, keys) as wire:
        wire.add("running", steps=30)
        wire.add("prepared")
        wire.add("waiting")
        wire.until(lambda: wire.of("running"))
        assert wire.stop() == 0
        wire.poll()
        assert [event["type"] for event in wire.events] == ["generation.started", "generation.succeeded"]
        assert wire.redis.hget(wire.keys.job("prepared"), "attempt") in (b"0", None)
        assert wire.redis.zcard(wire.keys.consumers) == 0
    with consuming(redis_at, s3, tiny_model, tmp_path, keys) as wire:
        # at once, though the lease is 5 s: what is handed back waits for nobody's lease
        events = wire.wait("prepared", "waiting")
        assert [event["data"]["attempt"] for event in events.values()] == [1, 1]
        assert wire.redis.xlen(wire.keys.request_streams[1]) == 0


def test_a_consumer_terminated_twice_hands_its_running_job_back_uncounted(
    redis_at: RedisServer, s3: S3Server, tiny_model: Path, tmp_path: Path, keys: Keys
) -> None:
    with consuming(redis_at, s3, tiny_model, tmp_path, keys) as wire:
        wire.add("running", steps=50, width=1024, height=1024, timeout=300)
        wire.until(lambda: wire.of("running"))
        wire.process.send_signal(signal.SIGTERM)
        wire.until(lambda: b"consumer.draining" in wire.log.read_bytes())
        assert wire.stop() == 0
        assert wire.redis.hmget(wire.keys.job("running"), "state", "attempt") == [b"queued", b"0"]


def test_a_killed_consumers_job_is_done_by_the_next_one(
    redis_at: RedisServer, s3: S3Server, tiny_model: Path, tmp_path: Path, keys: Keys
) -> None:
    with consuming(redis_at, s3, tiny_model, tmp_path, keys, SDXL_LEASE_SECONDS="1") as wire:
        wire.add("orphan", steps=40, timeout=300)
        wire.until(lambda: wire.of("orphan"))
        assert wire.stop(signal.SIGKILL) != 0
    with consuming(redis_at, s3, tiny_model, tmp_path, keys, SDXL_IDLE_EXIT_SECONDS="1") as wire:
        event = wire.wait("orphan")["orphan"]
        assert (event["type"], event["data"]["attempt"]) == ("generation.succeeded", 2)
        assert wire.process.wait(20) == 0  # idle


def test_a_consumer_that_cannot_load_its_model_says_so_and_pulls_nothing(
    redis_at: RedisServer, s3: S3Server, tiny_model: Path, tmp_path: Path, keys: Keys
) -> None:
    with consuming(redis_at, s3, tmp_path / "no-tiny_model", tmp_path, keys) as wire:
        wire.add("untouched")
        assert wire.process.wait(60) == 1
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
