"""What must hold after every fault, read from Redis, from the store and from the logs alone."""

import hashlib
import re
from collections import Counter
from typing import Any

from redis import Redis

from tests.chaos.world import BUCKET, MAX_ATTEMPTS, TERMINAL, World


def verify(world: World, *, forgot: bool = False) -> dict[str, int]:
    """Checks every invariant once all accepted jobs have ended; what is counted goes into the table.

    `forgot`: Redis itself has lost what it had acknowledged, so only what it still knows is held to them.
    """
    world.stop_consumers()
    events = world.events()
    ended = Counter((event["data"]["job_id"], event["data"]["run"]) for event in events if event["type"] in TERMINAL)
    lost = [job_id for job_id in world.accepted if not any(job_id == ended_id for ended_id, _ in ended)]
    twice = [job for job, times in ended.items() if times > 1]
    leaked = leaks(world)
    if not forgot:
        assert not lost, (lost, world.logs())
        assert len({event["id"] for event in events}) == len(events), "an event was published twice"
    assert not twice, twice
    assert not leaked, leaked
    assert all(event["data"]["attempt"] <= MAX_ATTEMPTS for event in events)
    _verify_places(world)
    _verify_pictures(world, events)
    drawn = world.executions()
    return {
        "lost": len(lost),
        "duplicate_publications": len(twice),
        "duplicate_executions": sum(times - 1 for times in drawn.values()),
        "leaked_signatures": len(leaked),
    }


def leaks(world: World) -> list[str]:
    """Where a presigned query, or the signature of any URL that the store has signed, can be read.

    A job that Redis was made to forget before its end is not looked at: its run never ended.
    """
    places = {str(one.log): one.log.read_text(errors="replace") for one in world.consumers}
    kept = set(world.redis.scan_iter("*")) - {world.keys.job(job_id).encode() for job_id in world.forgotten}
    places |= {key.decode(): _content(world.redis, key) for key in kept}
    return [place for place, text in places.items() if _is_leaky(text, world.store.signatures)]


def _is_leaky(text: str, signatures: set[str]) -> bool:
    bare = text.replace("\\x00", "")  # as `repr` writes the bytes of UTF-16
    return "x-amz-signature" in bare.lower() or not signatures.isdisjoint(re.findall("(?=([0-9a-f]{64}))", bare))


def _content(redis: Redis, key: bytes) -> str:
    """All that is readable under a key. Not its DUMP, which is compressed."""
    readers: dict[bytes, Any] = {
        b"string": redis.get,
        b"hash": redis.hgetall,
        b"stream": redis.xrange,
        b"list": lambda name: redis.lrange(name, 0, -1),
        b"set": redis.smembers,
        b"zset": lambda name: redis.zrange(name, 0, -1),
        b"none": lambda name: None,
    }
    kind: Any = redis.type(key)
    return str(readers[kind](key))


def _verify_places(world: World) -> None:
    """Nothing is left waiting: every job that Redis knows is done, and in no other place."""
    for stream in world.keys.request_streams:
        assert world.redis.xlen(stream) == 0, stream
    assert world.redis.zcard(world.keys.delayed) == 0
    forgotten = {world.keys.job(job_id).encode() for job_id in world.forgotten}
    for key in set(world.redis.scan_iter(world.keys.job("*"))) - forgotten:
        assert world.redis.hget(key, "state") in (b"succeeded", b"failed", b"cancelled"), key


def _verify_pictures(world: World, events: list[dict[str, Any]]) -> None:
    """One object for each picture, and it is the one that its event names."""
    for data in (event["data"] for event in events if event["type"] == "generation.succeeded"):
        if data["image_key"] is not None:
            stored = world.store.objects[f"/{BUCKET}/{data['image_key']}"]
            assert hashlib.sha256(stored.body).hexdigest() == data["image_sha256"], data["job_id"]
    pictures = [path for path in world.store.objects if path.startswith(f"/{BUCKET}/images/")]
    assert len(pictures) <= len(world.accepted) + len(world.forgotten)
