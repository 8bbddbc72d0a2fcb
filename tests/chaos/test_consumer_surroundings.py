"""Faults 26 to 29: deadly jobs, and consumers that are alike, off, or of another age."""

import json
import signal
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import SecretStr

from producer.client import GenerationClient
from producer.settings import ProducerSettings
from tests.chaos.backend import a_backend
from tests.chaos.kills_kit import has_started, idles_s, survivor
from tests.chaos.surroundings import CLOCK_OFFSET_S, NAME
from tests.chaos.world import BUCKET, LEASE_S, LORA, Consumer, World

KILLED = -signal.SIGKILL
SAME_NAME: dict[str, Any] = {NAME: "ann"}


def until_killed(world: World, consumer: Consumer) -> None:
    """Until everything that it held may be taken over."""
    assert consumer.wait() == KILLED
    world.until(lambda: all(idle_s > LEASE_S for idle_s in idles_s(world)))


@pytest.mark.fault(26, "a job that kills the process three times")
def test_a_deadly_job_is_buried_after_its_third_consumer_and_its_neighbours_live(world: World) -> None:
    """Guards `last.attempt >= max_attempts` in BEGIN: the fourth consumer is not to be killed too.

    And `Slots.clear_for`: a job that is prepared beside the deadly one each time is counted with it.
    """
    world.publish("bad", prompt="deadly")
    first = world.consumer(CHAOS_STEP_S="0.3")  # it dies at the eleventh: time to take another
    world.until(world.executions)
    world.publish("neighbour")
    until_killed(world, first)
    for _ in range(2):
        until_killed(world, world.consumer(CHAOS_STEP_S="0.1"))
    world.injected(3)
    last = world.consumer()
    ended = world.until_ended()
    world.recovered()
    data = ended["bad"]["data"]
    assert (data["error_code"], data["attempt"], data["retry_after"]) == ("WORKER_LOST", 3, 60)
    assert data["dead_lettered"]
    assert world.executions()["bad"] == 3
    assert last.process.poll() is None
    assert ended["neighbour"]["type"] == "generation.succeeded"
    assert ended["neighbour"]["data"]["attempt"] == 2


@pytest.mark.fault(27, "clock ±10 min")
@pytest.mark.parametrize("offset_s", [-600, 600], ids=["behind", "ahead"])
def test_a_clock_that_is_off_judges_no_url_and_no_lease(world: World, offset_s: int) -> None:
    """Guards the slack in `_check_lifetime`, Redis' clock in `Artifacts.check` and BEGIN, and `PRESIGNED_GET_S`."""
    now, minutes = datetime.now(UTC), timedelta(minutes=1)
    old = now - 5 * minutes
    other = survivor(world)
    off: dict[str, Any] = {CLOCK_OFFSET_S: str(offset_s)}
    world.consumer(**off, CHAOS_STEP_S="0.05")
    world.injected()
    world.publish("fresh")
    world.publish("own", lora_url=None, lora_key=LORA.split("/", 2)[2])
    world.publish("stale", lora_url=world.store.presign("GET", LORA, expires_s=60, at=old))
    world.publish("put", upload_url=world.store.presign("PUT", f"/{BUCKET}/images/put.png"))
    world.publish("late-put", upload_url=world.store.presign("PUT", f"/{BUCKET}/late.png", expires_s=60, at=old))
    world.publish("in-time", expires_at=(now + 5 * minutes).isoformat())
    world.publish("expired", expires_at=(now - minutes).isoformat())
    ended = world.until_ended()
    world.recovered()
    codes = {name: event["data"].get("error_code") for name, event in ended.items()}
    assert codes == {
        **dict.fromkeys(("fresh", "own", "put", "in-time")),
        "stale": "LORA_DOWNLOAD_FAILED",
        "late-put": "UPLOAD_FAILED",
        "expired": "EXPIRED",
    }
    assert {ended[name]["data"]["retry_after"] for name in ("stale", "late-put", "expired")} == {0}
    assert {event["data"]["attempt"] for name, event in ended.items() if name != "expired"} == {1}
    assert world.executions().keys() == {"fresh", "own", "put", "in-time"}
    world.publish("long", steps=50)
    world.until(lambda: has_started(world, "long"))
    other.signal(signal.SIGCONT)  # whose clock is right: what the first one holds is not its prey
    assert world.until_ended("long")["long"]["data"]["attempt"] == 1


@pytest.mark.fault(28, "the same consumer name twice")
def test_two_consumers_of_one_name_publish_once_and_count_every_attempt(world: World) -> None:
    """Guards `_boot` in the token of `Leases.lease`: BEGIN would take the second consumer for the first one.

    A machine that is restored from one snapshot twice brings such a pair. The second one takes over at once what is
    pending under its name; the first one sees that its token is no longer the job's.
    """
    first = world.consumer(**SAME_NAME, CHAOS_STEP_S="0.5")
    world.publish("a")
    world.until(lambda: has_started(world, "a"))
    world.injected()
    world.consumer(**SAME_NAME)
    world.publish("b", "c")
    ended = world.until_ended()
    world.recovered()
    world.until(lambda: first.said("lease.lost"))
    assert ended["a"]["data"]["attempt"] == world.executions()["a"] == 2


@pytest.mark.fault(29, "old and new schema side by side")
def test_a_request_of_a_later_version_is_refused_at_once_and_the_others_are_done(world: World) -> None:
    """Guards the rule of `v` in GenerationRequest, and that an entry's unknown fields are passed over."""
    world.consumer()
    world.injected()
    world.publish("without")
    world.publish("old", v=1)
    world.publish("new", v=2)
    world.publish("newer", v=2, priority_boost=True)
    world.add({"job_id": "enveloped", "prompt": "a red fox", "steps": 20}, tracestate="vendor=1")
    world.accepted.append("enveloped")
    ended = world.until_ended()
    world.recovered()
    codes = {name: event["data"].get("error_code") for name, event in ended.items()}
    assert codes == {
        **dict.fromkeys(("without", "old", "enveloped")),
        **dict.fromkeys(("new", "newer"), "INVALID_REQUEST"),
    }
    assert {ended[name]["data"]["retry_after"] for name in ("new", "newer")} == {None}
    assert world.executions().keys() == {"without", "old", "enveloped"}


@pytest.mark.fault(29, "old and new schema side by side")
def test_a_backend_passes_over_what_a_later_consumer_says_besides(world: World) -> None:
    """Guards `extra="ignore"` of the events' models, for the listener and for the client."""
    with a_backend(world) as backend:
        world.injected()
        backend.listen()
        world.consumer()
        world.publish("a")
        event = world.until_ended()["a"]
        later = {**event, "spec": 2, "data": {**event["data"], "gpu_watts": 300}}
        world.redis.hset(world.keys.job("a"), mapping={"node": "rack-7", "event": json.dumps(later)})
        other = {**later, "id": "b:1:succeeded", "data": {**later["data"], "job_id": "b"}}
        fields: dict[Any, Any] = {"type": other["type"], "job_id": "b", "payload": json.dumps(other), "node": "rack-7"}
        world.redis.xadd(world.keys.completions, fields)
        backend.until(backend.has_every_event)
        world.recovered()
        backend.verify()
        settings = ProducerSettings(redis_url=SecretStr(f"redis://127.0.0.1:{world.proxy.server_port}/0"))
        with GenerationClient.from_settings(settings) as client:
            assert client.result("a", timeout_s=10).id == "a:1:succeeded"
