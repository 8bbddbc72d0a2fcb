"""Fault 18: SIGKILL before and after every step of a job. The next consumer goes on where this one has died."""

import hashlib
import json
import signal
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from schemas.keys import Priority
from tests.chaos.kills_kit import freeze, has_started, idles_s, survivor, thaw_and_measure
from tests.chaos.world import BUCKET, LEASE_S, LORA, World
from tests.s3_stub import StoredObject, content, status

KILLED = -signal.SIGKILL
SIDES = ("before", "after")
SLOWLY: dict[str, Any] = {"CHAOS_STEP_S": "0.1"}  # two seconds: the lease has to be renewed meanwhile
PLAIN: dict[str, dict[str, Any]] = {
    **{step: {} for step in ("read", "begin", "start", "progress", "download", "prepare", "patch", "generate")},
    **{step: {} for step in ("encode", "upload", "finish")},
    "extend": SLOWLY,
}
UNCOUNTED = ("read.before", "read.after", "begin.before", "finish.after")

each_boundary = pytest.mark.fault(18, "SIGKILL at each boundary")


def killed_at(world: World, place: str, **environment: Any) -> None:
    """A consumer has died at `place`."""
    assert world.consumer(failpoints=f"{place}=kill", SDXL_PREFETCH="0", **environment).wait() == KILLED


@each_boundary
@pytest.mark.parametrize("step", PLAIN)
def test_a_job_whose_consumer_dies_at_a_step_is_ended_by_another_one(world: World, step: str) -> None:
    """Guards the reclaim in `Worker._more`, the count of attempts in BEGIN, and that FINISH is one script."""
    other = survivor(world)
    for side in SIDES:
        world.publish(side)
        killed_at(world, f"{step}.{side}", **PLAIN[step])
        event = thaw_and_measure(world, other, side)[side]
        assert event["type"] == "generation.succeeded"
        assert event["data"]["attempt"] == (1 if f"{step}.{side}" in UNCOUNTED else 2)
        freeze(world, other)


@each_boundary
def test_a_picture_that_was_stored_before_its_consumer_died_is_adopted(world: World) -> None:
    """Guards `found.run == stamp.run` in `ArtifactStore._upload`.

    The picture that is there is changed first, as another GPU would round it: the event must name what is there.
    """
    other = survivor(world)
    world.publish("a")
    killed_at(world, "upload.after")
    path = f"/{BUCKET}/images/a.png"
    digest = hashlib.sha256(b"rounded otherwise").hexdigest()
    stored = world.store.objects[path]
    metadata = {**stored.metadata, "x-amz-meta-sha256": digest}
    world.store.objects[path] = replace(StoredObject(b"rounded otherwise"), metadata=metadata)
    event = thaw_and_measure(world, other, "a")["a"]
    assert event["data"]["image_sha256"] == digest
    assert world.store.objects[path].body == b"rounded otherwise"


@each_boundary
@pytest.mark.parametrize("step", ["note_upload", "upload"])
def test_an_upload_to_a_signed_url_is_adopted_by_what_was_noted_before_it(world: World, step: str) -> None:
    """Guards the loop over `noted` in `Artifacts._put`: the URL cannot be read, and the 412 alone says nothing."""
    other = survivor(world)
    for side in SIDES:
        path = f"/{BUCKET}/images/{side}.png"
        world.publish(side, upload_url=world.store.presign("PUT", path))
        killed_at(world, f"{step}.{side}")
        event = thaw_and_measure(world, other, side)[side]
        assert event["type"] == "generation.succeeded", event
        assert event["data"]["image_sha256"] == hashlib.sha256(world.store.objects[path].body).hexdigest()
        freeze(world, other)


@each_boundary
@pytest.mark.parametrize("step", ["retry", "promote"])
def test_a_job_whose_consumer_dies_while_it_is_put_aside_or_fetched_back_is_done(world: World, step: str) -> None:
    """Guards that RETRY and PROMOTE are one script each: `remove` in the one, `ZREM` in the other."""
    other = survivor(world)
    for side in SIDES:
        world.store.answer(LORA, status(503), content(b"lora"))
        world.publish(side)
        killed_at(world, f"{step}.{side}")
        assert thaw_and_measure(world, other, side)[side]["data"]["attempt"] == 2
        freeze(world, other)


@each_boundary
@pytest.mark.parametrize("side", SIDES)
def test_a_job_whose_consumer_dies_while_it_takes_over_a_dead_ones_job_is_done(world: World, side: str) -> None:
    """Guards that a claim is a lease of its own, which runs out: XAUTOCLAIM in RECLAIM, and its call."""
    other = survivor(world)
    world.publish("a", priority=Priority.HIGH)  # the stream that is looked at first
    killed_at(world, "generate.before")
    world.until(lambda: idles_s(world, Priority.HIGH)[0] > LEASE_S)
    killed_at(world, f"reclaim.{side}")
    assert thaw_and_measure(world, other)["a"]["data"]["attempt"] == 2


@each_boundary
@pytest.mark.parametrize("side", SIDES)
def test_a_consumer_that_dies_while_it_hands_its_job_back_leaves_it_to_another(world: World, side: str) -> None:
    """Guards that RELEASE is one script: handed back and uncounted, or neither.

    After it, the job waits for nobody's lease: `_RELEASED_IDLE_MS` lets the next reclaim take it.
    """
    other = survivor(world)
    victim = world.consumer(failpoints=f"release.{side}=kill", CHAOS_STEP_S="0.3", SDXL_DRAIN_SECONDS="30")
    world.publish("a")
    world.until(lambda: has_started(world, "a"))
    victim.signal(signal.SIGTERM)
    world.until(lambda: victim.said("consumer.draining"))
    victim.signal(signal.SIGTERM)
    assert victim.wait() == KILLED
    assert thaw_and_measure(world, other)["a"]["data"]["attempt"] == (2 if side == "before" else 1)


@each_boundary
def test_an_entry_that_cannot_be_read_is_buried_once_whoever_dies_over_it(world: World) -> None:
    """Guards that BURY is one script: `remove` and the letter."""
    other = survivor(world)
    for letters, side in enumerate(SIDES, start=1):
        world.redis.xadd(world.keys.requests(Priority.NORMAL), {"payload": json.dumps({"prompt": side})})
        killed_at(world, f"bury.{side}")
        world.injected()
        other.signal(signal.SIGCONT)
        world.until(partial(is_buried, world, letters))
        world.recovered()
        freeze(world, other)


def is_buried(world: World, letters: int) -> bool:
    """Whether there are so many dead letters, and nothing else is left."""
    return world.redis.xlen(world.keys.dead) == letters and not world.redis.xlen(world.keys.requests(Priority.NORMAL))
