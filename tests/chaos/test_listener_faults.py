"""Faults 41 to 43, and 46: the listener and the replay of dead letters. Webhooks: test_webhook_faults.py."""

import hashlib
import json
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from producer import scripts
from schemas.keys import Keys
from tests.chaos.backend import Backend, a_backend, sqlite_url
from tests.chaos.world import LORA, TERMINAL, World
from tests.integration.store_kit import everything
from tests.postgres import postgres_server

HOOK = "/hook"
SOME = [f"job-{number}" for number in range(12)]
MORE = [f"late-{number}" for number in range(12)]


@pytest.fixture
def backend(world: World) -> Iterator[Backend]:
    with a_backend(world) as backend:
        yield backend


def publish_and_store(world: World, backend: Backend, *job_ids: str, **fields: Any) -> None:
    """Publishes jobs and waits until the listener has stored all there is of them."""
    world.publish(*job_ids, **fields)
    world.until_ended(*job_ids)
    backend.until(backend.has_every_event)


@pytest.mark.fault(41, "database down")
def test_a_postgresql_that_is_killed_under_the_listener_loses_nothing(world: World) -> None:
    """Guards `except (RedisError, SQLAlchemyError, OSError)` in Listener.run.

    Without `reread` there it would recover as well, half a minute later, by the reclaim.
    """
    with postgres_server() as postgres, a_backend(world, postgres.create_database()) as backend:
        listener = backend.listen()
        world.consumer()
        publish_and_store(world, backend, *SOME, webhook_url=backend.hook(HOOK))
        postgres.kill()
        world.publish(*MORE, webhook_url=backend.hook(HOOK))
        world.until_ended()
        world.until(lambda: listener.said("listener.waiting"))
        postgres.start()
        world.injected()
        backend.until(backend.has_every_event)
        world.recovered()
        assert listener.process.poll() is None
        backend.verify()
        assert {row["job_id"] for row in backend.rows("deliveries")} == {*SOME, *MORE}


@pytest.mark.fault(41, "database down")
def test_a_sqlite_that_somebody_has_locked_is_waited_for(world: World, backend: Backend) -> None:
    """Guards the same line: SQLite gives up after its busy timeout."""
    listener = backend.listen()
    world.consumer()
    publish_and_store(world, backend, *SOME)
    with closing(sqlite3.connect(world.folder / "backend.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        world.publish(*MORE)
        world.until(lambda: listener.said("listener.waiting"))
    world.injected()
    backend.until(backend.has_every_event)
    world.recovered()
    assert listener.process.poll() is None
    backend.verify()


@pytest.mark.fault(42, "commit, then crash before ack")
def test_a_listener_killed_between_commit_and_acknowledgement_stores_each_event_once(
    world: World, backend: Backend
) -> None:
    """Guards `on_conflict_do_nothing` in Store._insert_events, and the reclaim in Listener._keep_up.

    Recovery is the wait until the dead listener's entries have been idle for long enough.
    """
    world.consumer()
    world.publish(*SOME, webhook_url=backend.hook(HOOK))
    world.until_ended()
    acknowledgement = world.proxy.add(b"XACK", "answer", times=1000)  # it reaches nobody, and nothing comes back
    listener = backend.listen()
    world.until(lambda: acknowledgement.met)
    before = everything(backend.engine)
    assert {row["job_id"] for row in before["events"]} == {row["job_id"] for row in before["deliveries"]} == set(SOME)
    listener.kill()
    world.proxy.heal()
    world.injected()
    again = backend.listen()
    backend.until(backend.has_every_event)
    world.recovered()
    assert all(again.said(row["event_id"]) for row in before["events"])
    backend.verify()
    assert everything(backend.engine) == before


@pytest.mark.fault(43, "duplicate and out-of-order events")
@pytest.mark.parametrize("seed", [1, 2], ids=["one", "two"])
def test_events_that_come_twice_and_in_any_order_make_the_same_rows(world: World, backend: Backend, seed: int) -> None:
    """Guards `where=_progress(JOBS.c) < _progress(insert.excluded)` in Store._move_jobs, and the key of `events`."""
    chance = random.Random(seed)
    world.consumer()
    for retried, refused in zip(SOME, MORE, strict=True):  # three failures in a row would end the consumer
        world.publish(retried, prompt="out of memory")
        world.publish(refused, lora_url=world.store.presign("GET", "/pictures/nowhere"))
        world.publish(f"{refused}-well")
    world.until_ended()
    in_order = backend.listen("--once")
    assert in_order.wait() == 0
    backend.verify()
    stream = world.events()
    stream += chance.choices(stream, k=len(stream))
    chance.shuffle(stream)
    late = Keys("late")
    for event in stream:
        entry: dict[Any, Any] = {"type": event["type"], "job_id": event["data"]["job_id"], "payload": json.dumps(event)}
        world.redis.xadd(late.completions, entry)
    with a_backend(world, sqlite_url(world.folder, "late")) as other:
        world.injected(len(stream))
        assert other.listen("--once", SDXL_PREFIX="late").wait() == 0
        world.recovered()
        assert jobs_and_events(other) == jobs_and_events(backend)


def jobs_and_events(backend: Backend) -> dict[str, Any]:
    found = everything(backend.engine)
    events = [{**row, "payload": json.loads(row["payload"])} for row in found["events"]]
    return {"jobs": found["jobs"], "images": found["images"], "events": events}


@pytest.mark.fault(46, "replay interrupted halfway")
@pytest.mark.parametrize("action", ["hang", "answer"], ids=["carried out", "not carried out"])
def test_a_replay_that_is_killed_halfway_and_run_again_replays_each_job_once(
    world: World, backend: Backend, action: Any
) -> None:
    """Guards the XDEL of the letter in REPLAY, in the same script as the run that follows it."""
    expired = world.store.presign("GET", LORA, expires_s=1, at=datetime.now(UTC) - timedelta(hours=1))
    world.consumer()
    world.publish(*SOME, lora_url=expired)
    world.until_ended()
    assert world.redis.xlen(world.keys.dead) == len(SOME)
    first = backend.replay("--rate", "20")
    world.until(lambda: first.log.read_bytes().count(b'"replayed"') >= 3)
    replay = hashlib.sha1(scripts.REPLAY.encode(), usedforsecurity=False).hexdigest().encode()
    rule = world.proxy.add(replay, action)
    world.until(lambda: rule.met)
    first.kill()
    world.injected()
    left = world.redis.xlen(world.keys.dead)
    assert 0 < left < len(SOME)
    second = backend.replay()
    assert second.wait() == 0
    world.until(lambda: ends(world) == {(job_id, 1): "generation.failed" for job_id in SOME} | second_runs())
    world.recovered()
    assert second.log.read_bytes().count(b'"verdict": "replayed"') == left
    assert world.redis.xlen(world.keys.dead) == 0
    assert backend.listen("--once").wait() == 0
    backend.verify()


def second_runs() -> dict[tuple[str, int], str]:
    return {(job_id, 2): "generation.succeeded" for job_id in SOME}


def ends(world: World) -> dict[tuple[str, int], str]:
    """How each run has ended."""
    ended = [event for event in world.events() if event["type"] in TERMINAL]
    return {(event["data"]["job_id"], event["data"]["run"]): event["type"] for event in ended}
